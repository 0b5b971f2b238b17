"""A stage's own process: what it says goes into a log, and what it measures into a file."""

from __future__ import annotations

import os
import time
from importlib import import_module

from gpu_stages.scene import Scene, Stage, write_json

# For tests of the run itself: "plain:raise,peers:hang" has these stages fail so.
FAULTS = "ON_A_GPU_FAULTS"
_KINDS = ("raise", "exit", "hang")


def main(stage: Stage, scene: Scene) -> None:
    """Run a stage and write DIR/name.json; whatever it raises ends the process with a traceback."""
    os.setsid()  # so that the parent can kill it with whatever it has started
    log = os.open(scene.out / f"{stage.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):  # what Python and what other libraries write
        os.dup2(log, stream)
    started = time.perf_counter()
    strike(stage.name)
    result = import_module(stage.module).run(scene, **stage.arguments)
    seconds = round(time.perf_counter() - started, 2)
    write_json(scene.out / f"{stage.name}.json", {"stage": stage.name, "seconds": seconds} | result)


def strike(name: str) -> None:
    """Fail as FAULTS asks of this stage."""
    faults = dict(pair.split(":") for pair in os.environ.get(FAULTS, "").split(",") if pair)
    kind = faults.get(name)
    if kind is None:
        return
    if kind not in _KINDS:
        raise ValueError(f"{FAULTS}: {kind!r} is not one of {', '.join(_KINDS)}")
    if kind == "raise":
        raise RuntimeError(f"{FAULTS} asks {name} to fail")
    if kind == "exit":
        os._exit(3)
    time.sleep(3600)


def ready() -> None:
    """Do nothing: the first process that is asked for also pays for the imports."""
