"""scripts/train: make the demo model from nothing, or distil SDXL with DMD2."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RUNS = ROOT / "training" / "runs"
# One process for each row: what it does on a CPU is in bfloat16, or not.
PHASES_OF_DEMO = [
    ["vae", "judge"],
    ["data", "teacher", "4step", "lora", "1step", "subject", "bundle"],
]


def main() -> None:
    """Start the processes of a training run, one phase after the other."""
    options, rest = parse_arguments()
    if options.model == "sdxl":
        launcher = ["-m", "accelerate.commands.accelerate_cli", "launch"]
        config = ["--config_file", options.config] if options.config else []
        run([*launcher, *config, "-m", "training", "sdxl", *rest])
        return
    runs = options.runs or RUNS / ("quick" if options.quick else "demo")
    processes = options.processes or default_processes()
    # Without its address torchrun takes the machine's own name, which need not resolve.
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    several = ["-m", "torch.distributed.run", *alone, f"--nproc-per-node={processes}"]
    launcher = several if processes > 1 and options.only != "results" else []
    flags = ["--runs", str(runs), *(["--quick"] if options.quick else [])]
    if options.drawings:
        flags += ["--drawings", str(options.drawings)]
    if options.distil_only or options.begin_with:
        from training.demo.bundle import unpack

        shipped = ROOT / "weights" / "demo"
        try:
            unpack(options.begin_with or shipped, runs, students=not options.distil_only)
        except ValueError as error:
            sys.exit(str(error))
    for phases in [[options.only]] if options.only else PHASES_OF_DEMO:
        run([*launcher, "-m", "training", "demo", *phases, *flags])
    if options.install:
        from training.demo.bundle import install_bundle

        install_bundle(runs / "bundle", ROOT / "weights")
    if options.only in (None, "bundle"):
        print(runs / "bundle")


def run(arguments: list[str]) -> None:
    """Run Python in the checkout; what fails ends the program with its exit status."""
    environment = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    if not has_gpu():
        environment["ACCELERATE_USE_CPU"] = "1"
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def default_processes() -> int:
    """One for each GPU; on a CPU, where one thread each is fastest, for at most 8 cores."""
    if has_gpu():
        import torch

        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(n for n in (1, 2, 4, 8) if n <= (cores or 1))


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The model and its flags; those of sdxl go to the trainer as they are."""
    parser = argparse.ArgumentParser(prog="scripts/train", description=__doc__)
    models = parser.add_subparsers(dest="model", required=True)
    demo = models.add_parser("demo", help="make the demo model: VAE, teacher, three students")
    demo.add_argument("--quick", action="store_true", help="the whole way in a minute")
    names = [*(phase for phases in PHASES_OF_DEMO for phase in phases), "results"]
    demo.add_argument("--only", choices=names, help="one phase alone")
    demo.add_argument(
        "--distil-only",
        action="store_true",
        help="begin with the VAE and teacher that are shipped, or are in --begin-with",
    )
    demo.add_argument("--runs", type=Path, help="where it is made (training/runs/demo)")
    demo.add_argument(
        "--drawings", type=Path, help="an archive of other drawings, packed as Fluent Emoji is"
    )
    demo.add_argument(
        "--begin-with", type=Path, help="a bundle, maybe without some students, which are then made"
    )
    demo.add_argument("--install", action="store_true", help="replace weights/demo with it")
    demo.add_argument("--processes", type=int, help="how many (one a GPU, or one a core)")
    sdxl = models.add_parser(
        "sdxl",
        help="distil SDXL or a checkpoint made from it",
        epilog="All other arguments: --teacher FOLDER --data FOLDER --runs FOLDER [--lora] "
        "[--one-step] [--size 1024]; see docs/method.md.",
    )
    sdxl.add_argument("--config", help="accelerate's, such as training/accelerate/fsdp.yaml")
    options, rest = parser.parse_known_args()
    if rest and options.model == "demo":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


if __name__ == "__main__":
    main()
