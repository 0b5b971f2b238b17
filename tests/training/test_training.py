"""The trainer: runs that repeat and resume, and models that the container loads as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from drawn import discs, pictures

from dmd2.loras.delta import merge
from dmd2.loras.formats import read_lora
from dmd2.loras.names import ModuleNames
from dmd2.models.loading import ModelParts
from training.config import DEMO, DemoConfig, DistillConfig, SubjectConfig, WarmStartConfig
from training.demo.drawings import Drawings
from training.demo.icons import SUBJECT
from training.demo.language import BACKGROUNDS, known_words
from training.demo.latents import LatentScenes
from training.demo.make import load_tokenizers
from training.demo.networks import CompactVocabulary, new_text_encoders, spread_embedding
from training.demo.scenes import caption_of
from training.demo.subject_lora import subject_scenes, train_subject_lora
from training.demo.teacher import min_snr_weight, spread_timesteps, train_teacher
from training.demo.vae import new_vae, whiten
from training.encode import encode
from training.method.conditioning import NoisePredictor, condition, embed, tokenize
from training.method.distillation import Distillation
from training.method.ode import follow_ode
from training.method.student import lora_modules, write_lora
from training.method.warm_start import WarmStart
from training.model_folder import noise_schedule
from training.run import Run

SMALL = replace(
    DEMO,
    unet_channels=(16, 16, 32),
    teacher=replace(DEMO.teacher, batch_size=4, num_steps=20, num_warm_up_steps=5),
)
FOUR_STEPS = DistillConfig(
    timesteps=(999, 749, 499, 249),
    batch_size=2,
    num_steps=3,
    student_learning_rate=1e-3,
    fake_learning_rate=1e-3,
    guidance_scale=3.0,
    num_fake_updates=2,
)


class Noise:
    """Latents of a tiny model's size; raises at the step that it is told to."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.fails_at = fails_at

    def batch(self, indices: range) -> tuple[torch.Tensor, list[str]]:
        if indices.start // len(indices) == self.fails_at:
            raise InterruptedError
        generator = torch.Generator().manual_seed(indices.start)
        captions = [self.caption(index) for index in indices]
        return torch.randn(len(indices), 4, 8, 8, generator=generator), captions

    def caption(self, index: int) -> str:
        return f"a red circle and {index}"


def small_scenes() -> LatentScenes:
    latents = np.random.default_rng(0).normal(size=(64, 4, 16, 16))
    captions = [f"a red circle on the sea {index}" for index in range(64)]
    return LatentScenes(latents.astype(np.float16), [captions, captions[::-1]])


def new_run(folder: Path, num_steps: int, batch_size: int, save_every_s: float = 300) -> Run:
    return Run(
        Accelerator(cpu=True), folder, num_steps=num_steps, batch_size=batch_size, seed=1,
        log_every=1, save_every_s=save_every_s,
    )  # fmt: skip


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def teacher(parts_in: Callable[[str], ModelParts]) -> ModelParts:
    """The tiny model, for all runs: none may change it."""
    return parts_in("float32")


def distil(
    folder: Path, teacher: ModelParts, config: DistillConfig, data: Noise, save_every_s: float = 300
) -> Any:
    torch.manual_seed(len(folder.name))  # a run's result is its own seed's, and not the global's
    run = new_run(folder, config.num_steps, config.batch_size, save_every_s)
    return Distillation(config, run, teacher, data).train()


def pretrain(folder: Path, config: DemoConfig) -> Any:
    torch.manual_seed(len(folder.name))
    run = new_run(folder, config.teacher.num_steps, config.teacher.batch_size)
    return train_teacher(
        config, run, small_scenes(), load_tokenizers(), noise_schedule().alphas_cumprod
    )


def test_the_same_seed_gives_the_same_first_twenty_losses(tmp_path: Path) -> None:
    for name in ("one", "another"):
        pretrain(tmp_path / name, SMALL)
    pretrain(tmp_path / "seed", replace(SMALL, seed=2, teacher=replace(SMALL.teacher, num_steps=1)))
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "one") == losses(tmp_path / "another")
    assert losses(tmp_path / "one")[:1] != losses(tmp_path / "seed")


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4}, {"timesteps": (399,), "gan_weight": 0}])
def test_a_killed_distillation_goes_on_as_if_nothing_had_been(
    teacher: ModelParts, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = replace(FOUR_STEPS, **change)
    whole = distil(tmp_path / "whole", teacher, config, Noise())
    with pytest.raises(InterruptedError):
        distil(tmp_path / "cut", teacher, config, Noise(fails_at=2), save_every_s=0)
    assert len(losses(tmp_path / "cut")) == 2
    resumed = distil(tmp_path / "cut", teacher, config, Noise())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


ONE_STEP = replace(
    FOUR_STEPS,
    timesteps=(399,),
    warm_start=WarmStartConfig(num_pairs=4, num_ode_steps=3, num_steps=20, learning_rate=3e-3),
)


def test_a_warm_start_learns_what_the_teacher_makes_of_the_noise(
    teacher: ModelParts, tmp_path: Path
) -> None:
    """And goes on with the pairs and the steps that a killed one has left."""
    weights = {}
    for name in ("whole", "cut"):
        run = new_run(tmp_path / name, 20, 2, save_every_s=0)
        warm_start = WarmStart(ONE_STEP, run, teacher, Noise())
        if name == "cut":
            run.num_steps = 3
            warm_start.train()
            pairs = np.load(tmp_path / name / "pairs-0.npy")
            pairs[2:] = 0  # as if it had been killed amid them
            np.save(tmp_path / name / "pairs-0.partial.npy", pairs)
            (tmp_path / name / "pairs-0.npy").unlink()
            run = new_run(tmp_path / name, 20, 2)
            warm_start = WarmStart(ONE_STEP, run, teacher, Noise())
        weights[name] = warm_start.train()
    found = losses(tmp_path / "whole")
    early, late = ([line["regression"] for line in part] for part in (found[:4], found[-4:]))
    assert sum(late) < 0.9 * sum(early)  # a random teacher's images have no order to learn
    assert losses(tmp_path / "cut") == found
    for name, weight in weights["whole"].items():
        assert torch.equal(weight, weights["cut"][name]), name


def test_the_pairs_are_the_teachers_images_of_their_noise_and_captions(
    teacher: ModelParts, tmp_path: Path
) -> None:
    WarmStart(ONE_STEP, new_run(tmp_path, 1, 2), teacher, Noise())
    images = torch.from_numpy(np.load(tmp_path / "pairs-0.npy")).float()
    drawn = np.random.default_rng([ONE_STEP.seed, 3]).standard_normal((4, 8, 8), np.float32)
    caption = condition(
        ["a red circle and 3"], teacher.tokenizers, teacher.text_encoders, (4, 8, 8)
    )
    expected = follow_ode(
        NoisePredictor(teacher.unet), torch.from_numpy(drawn)[None], caption,
        teacher.alphas_cumprod, num_steps=3, guidance_scale=ONE_STEP.guidance_scale,
    )  # fmt: skip
    torch.testing.assert_close(images[3:], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4}])
def test_a_distillation_starts_with_what_a_warm_start_has_learnt(
    teacher: ModelParts, tmp_path: Path, change: dict[str, Any]
) -> None:
    still = replace(ONE_STEP, num_steps=1, student_learning_rate=0.0, **change)
    start = WarmStart(still, new_run(tmp_path / "start", 2, 2), teacher, Noise()).train()
    assert start is not None
    run = new_run(tmp_path / "run", 1, 2)
    student = Distillation(still, run, teacher, Noise(), start).train().state_dict()
    assert student.keys() == start.keys()
    moved = [
        n for n, w in start.items() if not torch.equal(w, teacher.unet.state_dict().get(n, 0 * w))
    ]
    assert len(moved) > len(start) // 3
    for name, weight in start.items():
        torch.testing.assert_close(student[name], weight)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"warm_start": None}, "whose config has one"),
        ({"timesteps": (999, 749)}, "one step"),
        ({"batch_size": 3}, "4 pairs make no whole batches of 3"),
    ],
)
def test_a_warm_start_that_cannot_be_is_refused(
    teacher: ModelParts, tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    config = replace(ONE_STEP, **change)
    with pytest.raises(ValueError, match=complaint):
        WarmStart(config, new_run(tmp_path, 1, config.batch_size), teacher, Noise())


def test_the_rates_fall_over_the_run(teacher: ModelParts, tmp_path: Path) -> None:
    config = replace(FOUR_STEPS, num_steps=4)
    distillation = Distillation(config, new_run(tmp_path, 4, 2), teacher, Noise())
    optimizer = distillation._student_optimizer
    rates: list[float] = []
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    distillation.train()
    halfway = 1e-3 * (0.01 + 0.99 * 0.5)
    assert rates[0] == 1e-3
    assert rates[2] == pytest.approx(halfway)
    assert rates == sorted(rates, reverse=True)


def test_lines_after_the_last_checkpoint_are_not_told_twice(
    teacher: ModelParts, tmp_path: Path
) -> None:
    config = replace(FOUR_STEPS, num_steps=1)
    distil(tmp_path, teacher, config, Noise())
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 2, "loss": 9.0}) + "\n")
    distil(tmp_path, teacher, replace(config, num_steps=2), Noise())
    assert [line["step"] for line in losses(tmp_path)] == [1, 2]
    assert all("loss" not in line for line in losses(tmp_path))


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.num_processes = 2
    try:
        with pytest.raises(ValueError, match="3 cannot be shared by 2"):
            Run(accelerator, tmp_path, num_steps=1, batch_size=3, seed=1)
    finally:
        accelerator.state.num_processes = 1


def test_no_pass_takes_more_than_a_micro_batch(
    teacher: ModelParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    forward = NoisePredictor.forward

    def counting(self: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), len(latents)))
        return forward(self, latents, *rest)

    monkeypatch.setattr(NoisePredictor, "forward", counting)
    config = replace(FOUR_STEPS, num_steps=1, batch_size=6, micro_batch_size=2, gan_weight=0.0)
    distil(tmp_path, teacher, config, Noise())
    assert [size for has_graph, size in seen if has_graph] == [2, 2, 2]  # the student's
    assert {size for has_graph, size in seen if not has_graph} == {2, 4}  # the teacher is guided


def test_a_student_moves_and_its_teacher_stays(teacher: ModelParts, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    config = replace(FOUR_STEPS, num_steps=1)
    student = distil(tmp_path, teacher, config, Noise()).state_dict()
    moved = [name for name, value in before.items() if not torch.equal(value, student[name])]
    assert len(moved) > 0.9 * len(before)
    assert all(
        torch.equal(before[name], value) for name, value in teacher.unet.state_dict().items()
    )


def test_the_container_merges_a_trained_lora_to_what_was_trained(
    teacher: ModelParts, tmp_path: Path
) -> None:
    config = replace(FOUR_STEPS, lora_rank=4, lora_alpha=2.0, student_learning_rate=3e-2)
    unet = distil(tmp_path / "run", teacher, config, Noise())
    num_modules = write_lora(unet, tmp_path / "lora.safetensors", torch.float32)
    base = copy.deepcopy(teacher.unet)
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([499])
    inputs: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 77, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)},
    }
    with torch.no_grad():
        plain = base(latents, t, **inputs).sample
        trained = unet(latents, t, **inputs).sample
        weights = base.state_dict()
        lora = read_lora(tmp_path / "lora.safetensors", ModuleNames.of({"unet": weights}))
        assert len(lora.deltas["unet"]) == num_modules
        base.load_state_dict({**weights, **merge(weights, [(lora.deltas["unet"], 1.0)])})
        merged = base(latents, t, **inputs).sample
    assert (trained - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)


def test_unknown_words_read_alike_and_known_ones_do_not() -> None:
    tokenizers = load_tokenizers()
    vocabulary = CompactVocabulary(tokenizers[0])
    encoders = new_text_encoders(DEMO, vocabulary.size)
    prompts = ["a red circle", "a zebra circle", "a quantum circle", "a blue circle"]
    compact = [vocabulary.compact(tokenize(t, prompts)) for t in tokenizers]
    with torch.no_grad():
        before = embed(encoders, compact)
        for encoder in encoders:
            spread_embedding(encoder, vocabulary)
        after = embed(encoders, [tokenize(t, prompts) for t in tokenizers])
    for small, whole in zip(before, after, strict=True):
        torch.testing.assert_close(small, whole)
        assert torch.equal(whole[1], whole[2])
        assert not torch.allclose(whole[0], whole[1])
        assert not torch.allclose(whole[0], whole[3])


def test_whitened_latents_are_white_and_decode_as_before() -> None:
    torch.manual_seed(0)
    vae, images = new_vae(DEMO.vae).eval(), pictures(7, 16)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        whiten(vae, images)
        latents = encode(vae, images)
        after = vae.decode(latents / vae.config.scaling_factor).sample
    rows = latents.permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(torch.cov(rows), torch.eye(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(rows.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(before, after, atol=1e-3, rtol=1e-3)


def test_a_vaes_posterior_starts_narrow() -> None:
    torch.manual_seed(0)
    posterior = new_vae(DEMO.vae).encode(pictures(7, 2)).latent_dist
    assert posterior.logvar.mean().item() == pytest.approx(-5, abs=0.5)


def test_timesteps_are_spread_over_their_whole_range() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = spread_timesteps(50, generator)
    assert sorted(t // 20 for t in drawn.tolist()) == list(range(50))
    assert drawn.tolist() != sorted(drawn.tolist())


def test_min_snr_weighs_noise_fully_and_detail_less() -> None:
    alphas = torch.tensor([0.01, 0.5, 0.99])
    assert min_snr_weight(alphas).tolist() == pytest.approx([1.0, 1.0, 5 / 99], rel=1e-4)


def test_a_subject_lora_learns_its_drawings(teacher: ModelParts, tmp_path: Path) -> None:
    config = SubjectConfig(num_drawings=4, rank=4, num_steps=24, learning_rate=1e-2, seed=1)
    drawings, before = Drawings(discs(), 32), copy.deepcopy(teacher.unet.state_dict())
    run = new_run(tmp_path, config.num_steps, config.num_drawings)
    unet = train_subject_lora(config, run, teacher, drawings)
    found = [line["loss"] for line in losses(tmp_path)]
    assert sum(found[-6:]) < 0.8 * sum(found[:6])
    assert write_lora(unet, tmp_path / "lora.safetensors") == len(lora_modules(teacher.unet))
    assert all(torch.equal(w, before[n]) for n, w in teacher.unet.state_dict().items())


def test_a_subject_stands_on_every_background_and_is_told_by_its_name() -> None:
    scenes = subject_scenes(1, 20)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.objects[0].thing for scene in scenes} == {SUBJECT}
    assert SUBJECT not in known_words()
    assert caption_of(scenes[4], frozenset({"background"})) == "a hedgehog on a blue background"
