"""What the pipeline calls in place of a model: a way as long as it works, else the plain model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from dmd2.fast.ways import PLAIN, Part, Way
from dmd2.models import device_work

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Runner:
    """Runs calls of one model. Not thread-safe: the pipeline's thread runs it.

    Args:
        part: what the model does.
        plain: the model as diffusers has written it.
        let_go: forgets what can be made again, where a way finds no memory.

    Attributes:
        plain: that model, for whatever must not take a way: runner.plainly(call) in place of
            runner(call). So do second tries, and so must images whose weights or attention differ
            from the model's own, which no way has been judged on.
    """

    def __init__(self, part: Part, plain: Any, let_go: Callable[[], object] = lambda: None) -> None:
        self.part = part
        self.plain = plain
        self._let_go = let_go
        self._way: Way | None = None
        self._model: Any = None

    @property
    def way(self) -> str:
        """The name of what the next call takes."""
        return PLAIN if self._way is None else self._way.name

    @property
    def compiles(self) -> bool:
        """Whether the first call of a shape compiles."""
        return self._way is not None and self._way.compiles

    @property
    def keeps_memory(self) -> bool:
        """Whether dropping the way would leave more of the device's memory to others."""
        return self._way is not None and self._way.keeps_memory

    def adopt(self, way: Way, model: Any) -> None:
        """Call what a way has built from now on."""
        self._way, self._model = way, model

    def drop(self, why: str) -> None:
        """Call the plain model from now on, for good; of no effect where it is called already."""
        if self._way is None:
            return
        log.warning("way %s for a %s is dropped for good: it %s", self.way, self.part, why)
        self._way = self._model = None
        device_work.give_back_memory()  # of graphs, and of weights that were laid out anew

    def plainly(self, call: Callable[[Any], Result]) -> Result:
        """The result of call(plain)."""
        return call(self.plain)

    def __call__(self, call: Callable[[Any], Result]) -> Result:
        """The result of call(model).

        Where a way raises whatever it may, the plain model is called. If that works, the way was
        to blame, and is dropped; if not, the call was, and the plain model's error is raised. A way
        that runs out of memory is called once more before that, when what can be made again was let
        go and all unused memory given back: what was free may have lain in pieces, or a neighbour
        may have had it.
        """
        if self._way is None:
            return call(self.plain)
        failures: list[str] = []
        is_about_memory = True
        while is_about_memory and len(failures) < 2:
            try:
                return call(self._model)
            except Exception as error:
                failures.append(in_a_line(error))
                is_about_memory = device_work.is_about_memory(error)
            # Only here has the failed call let go of its tensors.
            if is_about_memory:
                self._let_go()
            device_work.give_back_memory()
        result = call(self.plain)
        self.drop(f"failed: {failures[0]}")
        return result


def in_a_line(error: Exception) -> str:
    """An error as a line of the log has it."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__
