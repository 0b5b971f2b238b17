"""One process of a training run; scripts/train starts as many as there are GPUs or cores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from dmd2.settings import ROOT
from training.config import DEMO, QUICK
from training.demo.drawings import Source
from training.demo.evaluation import Sizes
from training.demo.make import DemoMaking
from training.sdxl.distil import distil_sdxl, sdxl_config

# What is trained in bfloat16 on a CPU, where that is twice as fast.
IN_BFLOAT16 = ("vae", "judge")
PHASES = (*IN_BFLOAT16, "data", "teacher", *DEMO.students, "subject", "bundle", "results")


def main() -> None:
    """Take up the phase or the run that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    models = parser.add_subparsers(dest="model", required=True)
    demo = models.add_parser("demo")
    demo.add_argument("phases", nargs="+", choices=PHASES)
    demo.add_argument("--quick", action="store_true")
    demo.add_argument("--runs", type=Path, required=True)
    demo.add_argument("--drawings", type=Path)
    sdxl = models.add_parser("sdxl")
    add_sdxl_arguments(sdxl)
    options = parser.parse_args()
    if options.model == "demo":
        make_demo(
            options.phases,
            options.runs,
            options.drawings,
            is_quick=options.quick,
        )
    else:
        distil_sdxl(
            sdxl_config(lora=options.lora, one_step=options.one_step),
            Accelerator(),
            teacher=options.teacher,
            data=options.data,
            runs=options.runs,
            size=options.size,
        )


def make_demo(
    phases: Sequence[str],
    runs: Path,
    drawings: Path | None = None,
    *,
    is_quick: bool,
) -> None:
    """Do phases of the demo's making whose results are not there yet.

    The things' drawings are Fluent Emoji, unless another archive of drawings is given.

    For the UNets an epsilon in bfloat16 is too coarse at t = 999. So the phases in bfloat16 have a
    process of their own.
    """
    in_bfloat16 = [phase for phase in phases if phase in IN_BFLOAT16]
    if in_bfloat16 and len(in_bfloat16) < len(phases):
        raise SystemExit(
            f"{' and '.join(in_bfloat16)}: trained in bfloat16, and so without the other phases"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, which is fine enough for all phases
    accelerator = Accelerator(mixed_precision="bf16" if in_bfloat16 and not on_gpu else "no")
    source = Source(ROOT / "training" / "runs") if drawings is None else Source.of(drawings)
    making = DemoMaking(QUICK if is_quick else DEMO, runs, accelerator, source)
    for phase in phases:
        if phase == "results":
            few = Sizes(alone=6, pairs=4, frechet=20, diversity=4, subject=1)
            making.results(runs if is_quick else ROOT, few if is_quick else Sizes())
        elif phase in DEMO.students:
            making.student(phase)
        else:
            getattr(making, phase)()


def add_sdxl_arguments(parser: argparse.ArgumentParser) -> None:
    """What a distillation of SDXL must be told."""
    parser.add_argument("--teacher", type=Path, required=True, help="an undistilled model folder")
    parser.add_argument("--data", type=Path, required=True, help="pictures with NAME.txt beside")
    parser.add_argument("--runs", type=Path, required=True, help="for checkpoints and the result")
    parser.add_argument("--lora", action="store_true", help="a LoRA of rank 64, not all weights")
    parser.add_argument("--one-step", action="store_true", help="one step at t = 399, not four")
    parser.add_argument("--size", type=int, default=1024, help="of the pictures in pixels (1024)")


if __name__ == "__main__":
    main()
