"""The one run on a GPU: all that is to be known of one, in a few minutes.

    scripts/lib/python benchmarks/on_a_gpu.py [--out DIR] [--until SECONDS] [--only STAGES] [--dry]

Each stage is a process of its own, with a limit of its own, and writes DIR/STAGE.json and
DIR/STAGE.log; one that dies or hangs costs its own figures and no others. At the end stand the
goals beside what was measured, and DIR/summary.json, which holds all of it. The model is SDXL at
full size with random weights: 7 GB in /dev/shm, or where temporary files are; it is removed.

With --dry every stage runs on the CPU, with a tiny model: what that measures means nothing, and
says that the run will not end at a typing error. Needs neither Cog nor a network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATHS = (ROOT, ROOT / "scripts" / "lib", ROOT / "benchmarks")
sys.path[:0] = [str(path) for path in PATHS if str(path) not in sys.path]

from gpu_stages import child, goals  # noqa: E402
from gpu_stages.scene import Scene, Stage, write_json  # noqa: E402

STAGES = (
    Stage("facts", "gpu_stages.facts", 5, 40, {}),
    Stage("model", "gpu_stages.model", 15, 60, {}),
    Stage("plain", "gpu_stages.plain", 25, 90, {}),
    Stage("ways", "gpu_stages.ways", 30, 90, {}),
    Stage("tests", "gpu_stages.gpu_tests", 20, 90, {}),
    Stage("engine", "gpu_stages.engine", 25, 70, {"DMD2_TUNE": "quick"}),
    Stage("peers", "gpu_stages.against_peers", 40, 120, {}),
    Stage("setup", "gpu_stages.setup", 15, 60, {}),
    Stage("engine-plain", "gpu_stages.engine", 25, 70, {"DMD2_TUNE": "off"}),
    Stage("kernels", "gpu_stages.kernels", 10, 60, {}),
)
_MODEL_BYTES = 8e9
_KILLED_AFTER_S = 5.0
_DRY_LANES = 2


@dataclass(frozen=True)
class Outcome:
    """What became of a stage.

    Attributes:
        name: of the stage.
        seconds: that it took.
        problem: why it measured nothing, or what was wrong by its own account; None where all
            is well.
        result: what it measured, if it did.
    """

    name: str
    seconds: float
    problem: str | None
    result: Mapping[str, Any] | None

    def __str__(self) -> str:
        said = self.problem or (self.result or {}).get("headline", "")
        return f"{self.name:12} {self.seconds:6.1f} s  {'FAILED: ' if self.problem else ''}{said}"


def main() -> None:
    """Run the stages in order; ends with 1 if one measured nothing, or a test failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the model is removed
    options = parse_arguments()
    stages = [stage for stage in STAGES if options.only is None or stage.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    prepare_environment(options.dry)
    # Python's own server of processes imports once what every stage needs, and forks them.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["gpu_stages.imports"])
    with tempfile.TemporaryDirectory(prefix="dmd2-", dir=roomy(options.dry)) as scratch:
        scene = Scene(options.out.resolve(), Path(scratch), options.dry)
        outcomes = run_all(stages, scene, processes, time.monotonic() + options.until)
    summary = summarise(outcomes, options)
    write_json(options.out / "summary.json", summary)
    print("dry: these figures mean nothing" if options.dry else "")
    print_goals(summary["goals"])
    print(json.dumps({key: summary[key] for key in ("gpu", "failed", "commit", "seconds")}))
    sys.exit(1 if summary["failed"] else 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add, names = parser.add_argument, [stage.name for stage in STAGES]
    add("--out", type=Path, default=Path("on-a-gpu"), metavar="DIR", help="on-a-gpu")
    add("--until", type=float, default=560, metavar="SECONDS", help="of the whole run; 560")
    add("--only", metavar="STAGES", help=f"some of {','.join(names)}")
    add("--dry", action="store_true", help="on the CPU, with a tiny model")
    add("--commit", help="of this code, where git does not know")
    options = parser.parse_args()
    options.only = None if options.only is None else options.only.split(",")
    if set(options.only or ()) - set(names):
        parser.error(f"--only takes {','.join(names)}")
    return options


def prepare_environment(dry: bool) -> None:
    """What the stages' processes inherit."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PATHS), *filter(None, known)])
    os.environ["HF_HUB_OFFLINE"] = "1"
    if dry:  # two stages at once, each with as many threads as there are cores, take minutes
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Asked otherwise, torch opens the GPU where it is imported, and what forks from there has none.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def roomy(dry: bool) -> str | None:
    """Memory's own file system where the model has room; None is the system's temporary folder."""
    memory = Path("/dev/shm")
    is_roomy = memory.is_dir() and shutil.disk_usage(memory).free > _MODEL_BYTES
    return str(memory) if is_roomy and not dry else None


def run_all(
    stages: Sequence[Stage], scene: Scene, processes: BaseContext, deadline: float
) -> list[Outcome]:
    """Each stage's outcome, told as it comes; what no longer fits before deadline is not begun."""

    def run(stage: Stage) -> Outcome:
        outcome = run_in_time(stage, scene, processes, deadline - time.monotonic())
        print(outcome, flush=True)
        return outcome

    outcomes = [run(stage) for stage in stages[:1]]
    if outcomes and outcomes[0].problem and processes.get_start_method() != "spawn":
        print("it is tried again, and from here on each stage imports for itself", flush=True)
        processes = multiprocessing.get_context("spawn")
        outcomes = [run(stages[0])]
    outcomes += map(run, stages[1:2])
    if not scene.dry:
        return [*outcomes, *map(run, stages[2:])]
    with ThreadPoolExecutor(_DRY_LANES) as lanes:  # where nothing is measured, two run at once
        # From the last on, so that setup, which imports for itself, is not what all wait for.
        return [*outcomes, *lanes.map(run, reversed(stages[2:]))]


def run_in_time(stage: Stage, scene: Scene, processes: BaseContext, left_s: float) -> Outcome:
    """A stage's outcome, if there is the time for it."""
    if left_s < (0 if scene.dry else stage.usual_s):
        why = f"skipped: {left_s:.0f} s are left, and it takes about {stage.usual_s:g} s"
        return Outcome(stage.name, 0.0, why, None)
    return run_stage(stage, scene, processes, min(stage.limit_s, left_s))


def run_stage(stage: Stage, scene: Scene, processes: BaseContext, limit_s: float) -> Outcome:
    """A stage in a process of its own, which is killed after limit_s with all that it started."""
    result_path = scene.out / f"{stage.name}.json"
    result_path.unlink(missing_ok=True)
    started = time.monotonic()
    process = processes.Process(target=child.main, args=(stage, scene), name=stage.name)
    process.start()
    process.join(max(0.0, limit_s))
    is_hanging = process.is_alive()
    kill(process)
    seconds = time.monotonic() - started
    if is_hanging:
        problem = f"killed after {limit_s:.0f} s"
    elif process.exitcode or not result_path.is_file():
        problem = f"ended with {process.exitcode}: {last_line(scene.out / f'{stage.name}.log')}"
    else:
        result = json.loads(result_path.read_text())
        return Outcome(stage.name, seconds, result.get("problem"), result)
    return Outcome(stage.name, seconds, problem, None)


def kill(process: BaseProcess) -> None:
    """End a stage's process group, whatever of it is left."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or not yet made a group of its own
        process.kill()
    process.join(_KILLED_AFTER_S)


def last_line(log: Path) -> str:
    """What a log ends with; "" where it says nothing."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else ""


def summarise(outcomes: Sequence[Outcome], options: argparse.Namespace) -> dict[str, Any]:
    """All of it: on what, by which code, how, and every stage's figures."""
    results = {o.name: o.result for o in outcomes if o.result is not None}
    facts = results.get("facts", {})
    smi = facts.get("nvidia_smi") or {}
    return {
        "benchmark": "on_a_gpu",
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": " ".join(["benchmarks/on_a_gpu.py", *sys.argv[1:]]),
        "commit": options.commit or commit(),
        "dry": options.dry,
        "gpu": facts.get("gpu"),
        "driver": smi.get("driver_version"),
        "versions": facts.get("versions"),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "failed": {o.name: o.problem for o in outcomes if o.problem is not None},
        "goals": goals.compare(results),
        "stages": results,
    }


def commit() -> str | None:
    """What git says is checked out; "-dirty" stands behind it where files were changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def print_goals(rows: Sequence[Mapping[str, Any]]) -> None:
    """The goals beside what was measured, in Markdown."""
    columns = ("goal", "must", "good", "measured", "verdict")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        cells = ("-" if row[name] is None else str(row[name]) for name in columns)
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
