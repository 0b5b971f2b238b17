"""A bar on standard error for a prediction that takes more than a few seconds."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

SHOW_AFTER_S = 3.0
LOOK_S = 0.2
# A decode takes as long as one and a half steps.
WORTH = {"step": 1.0, "decode": 1.5}
BAR = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left{postfix}"


@contextmanager
def progress_bar(path: Path) -> Iterator[None]:
    """Show what dmd2.engine.progress writes to a file, while the body of `with` runs."""
    path.touch()
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(path: Path, over: threading.Event) -> None:
    started, bar = time.time(), None
    done: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        while not over.wait(LOOK_S):
            for line in lines:
                unit = json.loads(line)
                done[unit["kind"]] += 1
                each = unit["num_inference_steps"] * WORTH["step"] + WORTH["decode"]
                if bar is None and time.time() - started > SHOW_AFTER_S:
                    bar = tqdm(
                        total=unit["num_outputs"] * each,
                        file=sys.stderr,
                        leave=False,
                        bar_format=BAR,
                    )
                    bar.start_t = started
            if bar is not None:
                bar.n = sum(worth * done[kind] for kind, worth in WORTH.items())
                bar.set_postfix_str(f"{done['step']} steps, {done['decode']} images")
    if bar is not None:
        bar.close()
