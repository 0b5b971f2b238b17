"""peers.py with few repeats: ours beside stock diffusers, in one process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import peers

from gpu_stages import model
from gpu_stages.scene import Scene

_PEERS = ("ours", "ours-plain", "diffusers", "attention-slicing")


def run(scene: Scene) -> dict[str, Any]:
    """Its report, and stock diffusers' eager time over ours: latency of one, throughput of most."""
    batches = scene.pick((1, 8), (1, 2))
    options = {
        "--device": scene.device,
        "--model": str(model.settled(scene)),
        "--peers": ",".join(_PEERS),
        "--batches": ",".join(map(str, batches)),
        "--repeats": str(scene.pick(3, 1)),
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        peers.main([word for pair in options.items() for word in pair])
    print(said.getvalue(), file=sys.stderr)
    report: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    ours = [row["time_over_diffusers"] for row in report["rows"] if row["peer"] == "ours"]
    ratios = [None if ratio is None else round(1 / ratio, 3) for ratio in ours]
    figures = {"latency_ratio": ratios[0], "throughput_ratio": ratios[-1]}
    headline = ", ".join(f"{name} {ratio}" for name, ratio in figures.items())
    return {"headline": headline, **figures, **report}
