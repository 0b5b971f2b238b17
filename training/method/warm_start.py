"""A start for a student of one step: regression onto the teacher's own way from noise to image.

Distribution matching moves what the student already makes. A copy of the teacher makes a blur of
pure noise, finds few of the teacher's images from there, and stays with them. So a 1-step student
first learns the teacher's ODE, whose image is a function of its noise: pairs of both are made,
and the student is fitted to them. Different noise then stays different images. DMD regresses so
all the time (arXiv 2311.18828, section 4.2); DMD2's one-step SDXL only begins with it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from dmd2.models.loading import ModelParts
from training.config import DistillConfig
from training.method.conditioning import Conditioning, NoisePredictor, condition, predict_x0
from training.method.distillation import Pairs
from training.method.ode import follow_ode
from training.method.student import as_student, trained
from training.run import Run, falling


class WarmStart:
    """The regression of a 1-step student, before its distillation.

    Args:
        config: of the distillation, with a warm_start and one timestep.
        run: where it stands; its folder keeps the pairs too, a file for each process.
        teacher: a loaded model folder, in float32.
        data: whose captions the pairs are made of.

    Raises:
        ValueError: the config has no warm start, or several timesteps, or the processes cannot
            share its pairs in whole batches.
    """

    def __init__(self, config: DistillConfig, run: Run, teacher: ModelParts, data: Pairs) -> None:
        if config.warm_start is None or len(config.timesteps) != 1:
            raise ValueError("a warm start is for a student of one step whose config has one")
        self._config, self._warm_start, self._run = config, config.warm_start, run
        self._accelerator, self._data = run.accelerator, data
        num_pairs, num_processes = self._warm_start.num_pairs, run.accelerator.num_processes
        if num_pairs % (run.batch_size * num_processes):
            raise ValueError(f"{num_pairs} pairs make no whole batches of {config.batch_size}")
        self._share = num_pairs // num_processes
        self._first = self._share * run.accelerator.process_index

        device = run.accelerator.device
        self._tokenizers = teacher.tokenizers
        self._encoders = [encoder.to(device) for encoder in teacher.text_encoders]
        self._alphas_cumprod = teacher.alphas_cumprod.to(device)
        self._shape = data.batch(range(1))[0].shape[1:]
        self._images = self._make_images(NoisePredictor(teacher.unet))

        student = NoisePredictor(as_student(copy.deepcopy(teacher.unet), config))
        optimizer = torch.optim.AdamW(
            trained(student), lr=self._warm_start.learning_rate, betas=(0.9, 0.999)
        )
        self._schedule = falling(optimizer, self._warm_start.num_steps)
        self._accelerator.register_for_checkpointing(self._schedule)
        self._student, self._optimizer = self._accelerator.prepare(student, optimizer)

    def train(self) -> Any:
        """Take the steps that are left.

        Returns:
            In the main process the student's weights on the CPU, with which a Distillation can
            start; else None.
        """
        for step in self._run.steps():
            rows = self._rows(step)
            noise, conditioning = self._inputs(rows)
            t = torch.full((len(rows),), self._config.timesteps[0], device=noise.device)
            x0 = predict_x0(self._student, noise, t, conditioning, self._alphas_cumprod)
            images = torch.from_numpy(self._images[rows].astype(np.float32)).to(noise.device)
            loss = (x0 - images).square().mean()
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(trained(self._student), self._config.max_grad_norm)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            self._run.log(regression=loss.detach())
        weights = self._accelerator.get_state_dict(self._student)
        if not self._accelerator.is_main_process:
            return None
        return {name.removeprefix("unet."): weight.cpu() for name, weight in weights.items()}

    def _rows(self, step: int) -> NDArray[np.int64]:
        """Which pairs a step takes: each passing through them is in an order of its own."""
        passing, place = divmod(step * self._run.batch_size, self._share)
        order = np.random.default_rng([self._config.seed, passing]).permutation(self._share)
        return order[place : place + self._run.batch_size]

    def _inputs(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, Conditioning]:
        """The noise float32 [B, 4, H/8, W/8] and the captions of pairs."""
        numbers = [self._first + int(row) for row in rows]
        drawn = [
            np.random.default_rng([self._config.seed, n]).standard_normal(self._shape, np.float32)
            for n in numbers
        ]
        captions = [self._data.caption(n) for n in numbers]
        device = self._accelerator.device
        conditioning = condition(captions, self._tokenizers, self._encoders, self._shape)
        return torch.from_numpy(np.stack(drawn)).to(device), conditioning

    def _make_images(self, teacher: nn.Module) -> NDArray[np.float16]:
        """What the teacher makes of the noise, float16 [share, 4, H/8, W/8]; made once."""
        path = self._run.folder / f"pairs-{self._accelerator.process_index}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            if not partial.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                open_memmap(partial, "w+", np.float16, (self._share, *self._shape)).flush()
            teacher.to(self._accelerator.device)
            self._fill(open_memmap(partial, "r+"), teacher)
            teacher.cpu()
            partial.rename(path)
        images: NDArray[np.float16] = np.load(path, mmap_mode="r")
        return images

    def _fill(self, images: NDArray[np.float16], teacher: nn.Module) -> None:
        """Make those images, in place, that are still all zeros."""
        size, num_made = self._run.batch_size, int(images.any(axis=(1, 2, 3)).sum())
        starts = range(num_made // size * size, self._share, size)
        is_main = self._accelerator.is_main_process
        for start in tqdm(starts, "pairs", disable=not is_main, mininterval=5):
            noise, conditioning = self._inputs(np.arange(start, start + size))
            x0 = follow_ode(
                teacher,
                noise,
                conditioning,
                self._alphas_cumprod,
                num_steps=self._warm_start.num_ode_steps,
                guidance_scale=self._config.guidance_scale,
            )
            images[start : start + size] = x0.cpu().numpy()
