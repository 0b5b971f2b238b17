"""One training run: where it stands, its log, its checkpoints. accelerate does the rest.

Whatever is random in step n of process p is drawn from a generator seeded with (seed, n, p), so
that a run which is killed and resumed goes on exactly as if it had not been.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm


class Run:
    """A run of a number of steps in a folder of its own.

    The folder gets log.jsonl (a line every log_every steps, with the means since the last) and
    checkpoint/ (accelerate's state of everything that was prepared, every save_every_s seconds
    and at the end).

    Attributes:
        accelerator: prepares models and optimizers, and does the backward passes.
        folder: of the run.
        num_steps: in all.
        batch_size: of one process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        num_steps: int,
        batch_size: int,
        seed: int,
        log_every: int = 20,
        save_every_s: float = 300.0,
    ) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.num_steps = num_steps
        self.batch_size = batch_size // accelerator.num_processes
        if self.batch_size * accelerator.num_processes != batch_size:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared by {accelerator.num_processes} "
                "processes: choose a multiple"
            )
        self._seed = seed
        self._log_every = log_every
        self._save_every_s = save_every_s
        self._sums: dict[str, list[torch.Tensor | float]] = {}
        self._seconds_before = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run in this folder took the last step."""
        state = self._state()
        return state is not None and state["step"] >= self.num_steps

    def steps(self) -> Iterator[int]:
        """The steps that are left, from 0 or from the checkpoint on; call after preparing.

        Between two steps the log and the checkpoint are written.
        """
        state = self._state()
        first = 0
        if state is not None:
            self.accelerator.load_state(str(self.folder / "checkpoint"))
            first, self._seconds_before = state["step"], state["seconds"]
        self._cut_log(first)
        started = saved = time.monotonic()
        is_main = self.accelerator.is_main_process
        bar = tqdm(
            total=self.num_steps, initial=first, desc=self.folder.name, disable=not is_main,
            mininterval=5, smoothing=0.05,
        )  # fmt: skip
        for step in range(first, self.num_steps):
            yield step
            bar.update()
            now = time.monotonic()
            seconds = self._seconds_before + now - started
            if (step + 1) % self._log_every == 0 or step + 1 == self.num_steps:
                bar.set_postfix(self._write_log(step + 1, seconds))
            if self._agree(now - saved > self._save_every_s) or step + 1 == self.num_steps:
                self._save(step + 1, seconds)
                saved = time.monotonic()
        bar.close()

    def log(self, **values: torch.Tensor | float) -> None:
        """Add this step's values to the means of the next log line."""
        for name, value in values.items():
            self._sums.setdefault(name, []).append(value)  # read later: a GPU is not waited for

    def indices(self, step: int) -> range:
        """Which samples of the data set this process takes in a step; no two are the same."""
        first = (step * self.accelerator.num_processes + self._rank) * self.batch_size
        return range(first, first + self.batch_size)

    def generator(self, step: int) -> torch.Generator:
        """The CPU generator of this step in this process."""
        entropy = np.random.SeedSequence([self._seed, step, self._rank]).generate_state(1)[0]
        return torch.Generator("cpu").manual_seed(int(entropy))

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    def _state(self) -> dict[str, Any] | None:
        path = self.folder / "checkpoint" / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _agree(self, wish: bool) -> bool:
        """Whether the main process wishes it: the clocks of two processes differ."""
        if self.accelerator.num_processes == 1:
            return wish
        flag = torch.tensor(float(wish and self.accelerator.is_main_process))
        return bool(self.accelerator.reduce(flag.to(self.accelerator.device)).item())

    def _save(self, step: int, seconds: float) -> None:
        """Write a checkpoint beside the old one, then take its place."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint"
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = json.dumps({"step": step, "seconds": round(seconds, 1)})
            (new / "run.json").write_text(state + "\n", encoding="utf-8")
            shutil.rmtree(old, ignore_errors=True)
            new.rename(old)
        self.accelerator.wait_for_everyone()

    def _write_log(self, step: int, seconds: float) -> dict[str, str]:
        """Append the means over the steps since the last line, and over the processes."""
        names = sorted(self._sums)
        means = torch.tensor([float(sum(self._sums[n]) / len(self._sums[n])) for n in names])
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means.to(self.accelerator.device), "mean")
        self._sums.clear()
        values = {name: float(f"{mean:.6g}") for name, mean in zip(names, means, strict=True)}
        if self.accelerator.is_main_process:
            line = {"step": step, "seconds": round(seconds, 1), **values}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return {name: f"{value:.4g}" for name, value in values.items()}

    def _cut_log(self, step: int) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint."""
        path = self.folder / "log.jsonl"
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def falling(optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """A schedule for a rate that begins at its height and falls, see warm_up_and_decay."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay(num_steps, 0))


def warm_up_and_decay(num_steps: int, num_warm_up: int) -> Any:
    """A factor on the learning rate: linear up, then along a cosine down to a hundredth."""

    def factor(step: int) -> float:
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        share = (step - num_warm_up) / max(1, num_steps - num_warm_up)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor
