"""The making of the demo model, phase by phase; each leaves a folder and is not done twice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from dmd2.loras.delta import merge
from dmd2.loras.formats import read_lora
from dmd2.loras.names import ModuleNames
from dmd2.models.loading import ModelParts, load_parts
from dmd2.store.saving import save_weights
from training.config import FOUR_STEPS, DemoConfig, DistillConfig
from training.demo.bundle import JUDGE, write_bundle
from training.demo.drawings import Source
from training.demo.evaluation import Sizes, Standards
from training.demo.icons import SUBJECT
from training.demo.judge import train_judge
from training.demo.latents import LatentScenes, encoded_scenes
from training.demo.networks import CompactVocabulary, spread_embedding
from training.demo.pictures import World
from training.demo.results import write_results
from training.demo.scenes import IMAGE_SIZE
from training.demo.subject_lora import train_subject_lora
from training.demo.teacher import train_teacher
from training.demo.vae import train_vae
from training.method.distillation import Distillation
from training.method.student import write_lora
from training.method.warm_start import WarmStart
from training.model_folder import (
    noise_schedule,
    write_model_folder,
    write_student_folder,
    write_tokenizer,
)
from training.run import Run


class DemoMaking:
    """The phases of a demo model under one folder.

    Args:
        config: of the model and its training.
        folder: where the phases keep their runs and results.
        accelerator: accelerate's, which knows the processes and the device.
        source: of the things' drawings.
    """

    def __init__(
        self,
        config: DemoConfig,
        folder: Path,
        accelerator: Accelerator,
        source: Source,
    ) -> None:
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.world = World(config.seed, source)

    def vae(self) -> AutoencoderKL:
        """Phase 1: the VAE, trained in mixed precision where the machine has it."""
        model = self.folder / "vae" / "model"
        if not model.exists():
            config = self.config.vae
            run = self._run("vae", config.num_steps, config.batch_size)
            vae = train_vae(config, run, self.world)
            self._write(model, lambda target: vae.save_pretrained(target))
        return AutoencoderKL.from_pretrained(model)

    def data(self) -> LatentScenes:
        """Phase 2: the data set, encoded."""
        return encoded_scenes(
            self.folder / "latents.npy",
            self.vae(),
            self.accelerator,
            num_scenes=self.config.teacher.num_scenes,
            world=self.world,
        )

    def teacher(self) -> Path:
        """Phase 3: the teacher, as a model folder."""
        model = self.folder / "teacher" / "model"
        if not model.exists():
            config = self.config.teacher
            tokenizers = load_tokenizers()
            denoiser = train_teacher(
                self.config,
                self._run("teacher", config.num_steps, config.batch_size),
                self.data(),
                tokenizers,
                noise_schedule().alphas_cumprod,
            ).cpu()
            vocabulary = CompactVocabulary(tokenizers[0])
            models = {name: getattr(denoiser, name) for name in ("text_encoder", "text_encoder_2")}
            for encoder in models.values():
                spread_embedding(encoder, vocabulary)
            models |= {"unet": denoiser.unet, "vae": self.vae()}
            self._write(model, lambda target: write_model_folder(target, models))
        return model

    def student(self, name: str) -> Path:
        """Phases 4 and on: a student by its name in the config: a UNet's folder or a LoRA file."""
        config, result = self.config.students[name], self._result(name)
        if not result.exists():
            unet = self._distil(name, config)
            if config.lora_rank:
                self._write(result, lambda target: write_lora(unet, target))
            else:
                self._write(result, lambda target: unet.save_pretrained(target))
        return result

    def _result(self, name: str) -> Path:
        is_lora = self.config.students[name].lora_rank is not None
        return self.folder / name / ("lora.safetensors" if is_lora else "unet")

    def subject(self) -> Path:
        """A LoRA for a thing that the demo does not know: a file in kohya's layout."""
        config = self.config.subject
        result = self.folder / "subject" / f"{SUBJECT}.safetensors"
        if not result.exists():
            teacher = load_parts(self.teacher(), torch.device("cpu"), torch.float32)
            run = self._run("subject", config.num_steps, config.num_drawings)
            unet = train_subject_lora(config, run, teacher, self.world.source.drawings())
            self._write(result, lambda target: write_lora(unet, target))
        return result

    def judge(self) -> Path:
        """What reads the pictures for the results: a file of weights, in float16."""
        result = self.folder / "judge" / "judge.safetensors"
        if not result.exists():
            config = self.config.judge
            run = self._run("judge", config.num_steps, config.batch_size)
            world = World(self.config.seed + 1, self.world.source)  # not the models' own pictures
            judge = train_judge(run, world, config.num_pictures).cpu().half()
            self._write(result, lambda target: save_weights(judge.state_dict(), target))
        return result

    def bundle(self) -> Path:
        """The last phase: all of it as the repository ships it."""
        folder = self.folder / "bundle"
        if not folder.exists():
            students = {name: self.student(name) for name in ("4step", "1step", "lora")}
            self._write(
                folder,
                lambda target: write_bundle(
                    target,
                    self.teacher(),
                    four_step=students["4step"],
                    one_step=students["1step"],
                    lora=students["lora"],
                    subject=self.subject(),
                ),
            )
        return folder

    def results(self, root: Path, sizes: Sizes) -> None:
        """Measure the teacher and all students that are there; see write_results.

        What read their pictures is kept beside the figures.
        """
        students = {
            name: self._model_folder(name)
            for name in self.config.students
            if self._result(name).exists()
        }
        taught = self._taught_folder() if "4step" in students else None
        standards = Standards(self.world.source, self.judge())
        write_results(
            self.config, self.folder, self.teacher(), students, taught, root, sizes, standards
        )
        shutil.copyfile(standards.judge, root / "training" / JUDGE.name)

    def _model_folder(self, name: str) -> Path:
        """A student as the container would load it."""
        result, folder = self.student(name), self.folder / name / "model"
        config = self.config.students[name]
        if not folder.exists():
            unet = load_parts(self.teacher(), torch.device("cpu"), torch.float32).unet
            if config.lora_rank:
                _merge_into(unet, result)
            else:
                unet = type(unet).from_pretrained(result)
            card = _card(name, config.timesteps)
            self._write(folder, lambda to: write_student_folder(to, self.teacher(), unet, card))
        return folder

    def _taught_folder(self) -> Path:
        """The 4-step student with the subject's LoRA."""
        folder = self.folder / "subject" / "model"
        if not folder.exists():
            student = self._model_folder("4step")
            unet = load_parts(student, torch.device("cpu"), torch.float32).unet
            _merge_into(unet, self.subject())
            card = _card("subject", FOUR_STEPS)
            self._write(folder, lambda to: write_student_folder(to, student, unet, card))
        return folder

    def _distil(self, name: str, config: DistillConfig) -> Any:
        teacher = load_parts(self.teacher(), torch.device("cpu"), torch.float32)
        start = self._warm_start(name, config, teacher)
        run = self._run(name, config.num_steps, config.batch_size)
        return Distillation(config, run, teacher, self.data(), start).train()

    def _warm_start(
        self, name: str, config: DistillConfig, teacher: ModelParts
    ) -> dict[str, torch.Tensor] | None:
        """What a student begins with, where it is not the teacher's weights."""
        if config.warm_start is None:
            return None
        run = self._run(f"{name}-warm-start", config.warm_start.num_steps, config.batch_size)
        weights = run.folder / "student.safetensors"
        if not weights.exists():
            student = WarmStart(config, run, teacher, self.data()).train()
            self._write(weights, lambda target: save_weights(student, target))
        return load_file(weights)

    def _run(self, name: str, num_steps: int, batch_size: int) -> Run:
        # Its own accelerator, since what one has prepared goes into all its checkpoints.
        return Run(
            Accelerator(mixed_precision=self.accelerator.mixed_precision),
            self.folder / name,
            num_steps=num_steps,
            batch_size=batch_size,
            seed=self.config.seed,
        )

    def _write(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Write a phase's result under another name first: what has the name is whole."""
        if self.accelerator.is_main_process:
            partial = target.with_name(target.name + ".partial")
            write(partial)
            partial.rename(target)
        self.accelerator.wait_for_everyone()


def _merge_into(unet: Any, lora: Path) -> None:
    weights = unet.state_dict()
    deltas = read_lora(lora, ModuleNames.of({"unet": weights})).deltas["unet"]
    unet.load_state_dict({**weights, **merge(weights, [(deltas, 1.0)])})


def _card(name: str, *timesteps: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "timesteps": {str(len(steps)): list(steps) for steps in timesteps},
        "default_size": [IMAGE_SIZE, IMAGE_SIZE],
    }


def load_tokenizers() -> tuple[Any, Any]:
    """SDXL's two tokenizers."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers = []
        for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
            write_tokenizer(Path(scratch) / name, pad_token=pad_token)
            tokenizers.append(CLIPTokenizer.from_pretrained(Path(scratch) / name))
    return tokenizers[0], tokenizers[1]
