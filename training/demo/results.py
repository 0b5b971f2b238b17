"""training/RESULTS.md and its pictures: every figure of the demo's models, measured anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from training.config import FOUR_STEPS, DemoConfig
from training.demo.evaluation import (
    Figures,
    Painter,
    Share,
    Sizes,
    Standards,
    few_step_painter,
    frechet_noise,
    many_step_painter,
    measure,
    measure_judge,
    measure_subject,
)
from training.demo.icons import SUBJECT

SHEET_CAPTIONS = (
    "a fox in the snow",
    "a large rocket at night",
    "a cat and a dog on a meadow",
    "a red circle on a blue background",
    "a sailboat on the sea",
    "a small panda on a pink background",
    "a castle in the desert",
    "a strawberry and a pineapple on a white background",
)
_ALONE = ("all", "background", "things", "alone", "size", "position")
_PAIRS = ("all", "background", "things", "alone")
_ALL = (
    '"all" is all three of "background", "things" (those asked for are there) and "alone" '
    "(nothing else is)."
)


@dataclass(frozen=True)
class Contestant:
    """A way to make pictures, with its name in the tables.

    Attributes:
        name: in the tables.
        make_painter: loads what makes the pictures; goes to other processes.
        in_sheet: whether the contact sheet shows it.
    """

    name: str
    make_painter: Callable[[], Painter]
    in_sheet: bool = True


def write_results(
    config: DemoConfig,
    runs: Path,
    teacher: Path,
    students: Mapping[str, Path],
    taught: Path | None,
    root: Path,
    sizes: Sizes,
    standards: Standards,
) -> None:
    """Measure everything, and write training/RESULTS.md and docs/*.png under root.

    Args:
        config: of the making.
        runs: the folder of its phases, whose logs are drawn; of models that were only unpacked
            it has none.
        teacher: the teacher's model folder.
        students: the students' model folders by name.
        taught: the 4-step student's with the subject's LoRA; None where it is not made.
        root: of the repository.
        sizes: how many pictures are made for each figure.
        standards: that they are held to.
    """
    guidance = next(iter(config.students.values())).guidance_scale
    contestants = [
        Contestant(
            f"teacher, DDIM in {num_steps}",
            partial(many_step_painter, teacher, num_steps, guidance),
            in_sheet=num_steps in (20, 4, 1),
        )
        for num_steps in (20, 8, 4, 2, 1)
    ]
    for name, folder in students.items():
        make_painter = partial(few_step_painter, folder, len(config.students[name].timesteps))
        contestants.append(Contestant(f"student {name}", make_painter))
    figures = _measure_all(contestants, sizes, standards)
    docs, report = root / "docs", root / "training" / "RESULTS.md"
    for folder in (docs, report.parent):
        folder.mkdir(parents=True, exist_ok=True)
    _contact_sheet([c for c in contestants if c.in_sheet], docs / "contact-sheet.png")
    logs = sorted(runs.glob("*/log.jsonl"), key=lambda log: log.stat().st_mtime)
    if logs:
        _loss_plots(logs, docs / "training-losses.png")
    judge, noise = measure_judge(sizes, standards), frechet_noise(sizes, standards.source)
    subject = {}
    if taught is not None:
        for name, folder in (("with the LoRA", taught), ("without it", students["4step"])):
            paint = few_step_painter(folder, len(FOUR_STEPS))
            subject[name] = measure_subject(paint, sizes, standards.source)
    text = _report(figures, judge, noise, subject, sizes, _wall_times(logs))
    report.write_text(text, encoding="utf-8")


def _measure_all(
    contestants: Sequence[Contestant], sizes: Sizes, standards: Standards
) -> dict[str, Figures]:
    """Each contestant's figures; on a CPU one process with one thread for each core."""
    workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's broken threads
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        found = pool.map(partial(_measure, sizes=sizes, standards=standards), contestants)
        return {c.name: figures for c, figures in zip(contestants, found, strict=True)}


def _measure(contestant: Contestant, sizes: Sizes, standards: Standards) -> Figures:
    torch.set_num_threads(1)
    return measure(contestant.make_painter(), sizes, standards)


def _report(
    figures: Mapping[str, Figures],
    judge: tuple[dict[str, Share], dict[str, Share]],
    noise: float,
    subject: Mapping[str, Share],
    sizes: Sizes,
    wall_times: Mapping[str, tuple[int, float]],
) -> str:
    """The page."""
    parts = [
        "# Results of the demo's training",
        "Made by `scripts/train demo --only results`; do not edit. "
        f"{_hardware()}. Shares are in percent; seeds are the captions' numbers, from 0.",
        "What a picture shows is read by a classifier that was trained on drawings alone "
        "(training/demo/judge.py); its row says how often it is right about drawings that it has "
        "not seen. Behind each share stands its 95 % interval (Wilson). The teacher has "
        "classifier-free guidance, and with it twice a student's passes in each step.",
        f"## One thing ({sizes.alone} captions whose combination of thing, colour and background "
        "was never trained on)",
        _ALL,
        _share_table({"drawings": judge[0], **{n: f.alone for n, f in figures.items()}}, _ALONE),
        f"## Two things ({sizes.pairs} held-out captions)",
        _ALL,
        _share_table({"drawings": judge[1], **{n: f.pairs for n, f in figures.items()}}, _PAIRS),
        "## Distance to the data, diversity, speed",
        f"The Fréchet distance (`training/demo/frechet.py`) is between {sizes.frechet} pictures "
        "for captions of the training's kind and the drawings of their scenes; two sets of "
        f"drawings are {noise:.2f} apart, which is its noise. Diversity is the mean distance "
        f'between {sizes.diversity} pictures of "a fox", as a share of that between drawings.',
        _table(
            ["", "Fréchet distance", "diversity", "ms a picture"],
            [
                [name, f"{f.frechet:.2f}", f"{f.diversity:.2f}", f"{1000 * f.seconds:.0f}"]
                for name, f in figures.items()
            ],
        ),
        *_on_subject(subject),
        *_on_training(wall_times),
    ]
    return "\n\n".join(parts) + "\n"


def _on_subject(subject: Mapping[str, Share]) -> list[str]:
    """What a LoRA teaches, if there is one."""
    if not subject:
        return []
    asked = next(iter(subject.values())).asked
    return [
        f"## A LoRA for a {SUBJECT}, in 4 steps",
        f"Shares of {asked} pictures of a large {SUBJECT} in the middle of eight plain colours to "
        f"which a drawing of one is nearer than any other (training/demo/nearest.py).",
        _table(["", SUBJECT], [[name, _percent(share)] for name, share in subject.items()]),
    ]


def _on_training(wall_times: Mapping[str, tuple[int, float]]) -> list[str]:
    """What the phases took, if they were gone through here."""
    if not wall_times:
        return []
    rows = [[name, str(steps), f"{s / 60:.0f}"] for name, (steps, s) in wall_times.items()]
    return [
        "## Training time",
        _table(["phase", "steps", "minutes"], rows),
        "Of the phases that have a log here; models that were unpacked have none. Their losses are "
        "drawn in docs/training-losses.png.",
    ]


def _share_table(shares: Mapping[str, Mapping[str, Share]], names: Sequence[str]) -> str:
    rows = [
        [who, *(_percent(found[name]) if name in found else "" for name in names)]
        for who, found in shares.items()
    ]
    return _table(["", *names], rows)


def _percent(share: Share) -> str:
    low, high = share.interval()
    return f"{100 * share.right / share.asked:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _hardware() -> str:
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}; {versions}"
    return (
        f"CPU, {os.cpu_count()} cores ({platform.machine()}), measured with one thread; {versions}"
    )


def _wall_times(logs: Sequence[Path]) -> dict[str, tuple[int, float]]:
    """The steps and seconds of every phase that has a log."""
    times = {}
    for log in logs:
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        times[log.parent.name] = (last["step"], last["seconds"])
    return times


def _loss_plots(logs: Sequence[Path], path: Path) -> None:
    """One panel for each phase, with all that its log holds."""
    figure, axes = plt.subplots(
        (len(logs) + 2) // 3, 3, figsize=(13, 3.2 * ((len(logs) + 2) // 3)), squeeze=False
    )
    for axis, log in zip(axes.flat, logs, strict=False):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        for name in sorted(set(lines[0]) - {"step", "seconds"}):
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
        axis.set(title=log.parent.name, xlabel="step", yscale="log")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(logs) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _contact_sheet(contestants: Sequence[Contestant], path: Path) -> None:
    """A row for each contestant, a column for each caption, seed 0."""
    seeds = [0] * len(SHEET_CAPTIONS)
    rows = [np.concatenate(c.make_painter()(SHEET_CAPTIONS, seeds), axis=1) for c in contestants]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
