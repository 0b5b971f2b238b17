"""Engines that answer at once, or when a test says so, and that die when a test says so."""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Callable, Collection
from typing import Any

from deploy.gateway.prediction import Prediction
from deploy.gateway.work import EngineDiedError, Outcome, Work
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs

CARD = ModelCard("fake", {4: (999, 749, 499, 249)}, (1024, 1024))
# How long work takes that is not held, in turns of the event loop.
_TURNS = 5


def picture_of(work: Work, index: int = 0) -> bytes:
    """What the engines make of work, as a `data:` URL: other work has another picture."""
    request = work.request
    content = zlib.compress(f"{request.prompt} {request.seeds[index]}".encode())
    return b"data:image/png;base64," + base64.b64encode(content)


def answer_to(work: Work) -> Outcome:
    """What the engines say of work."""
    request = work.request
    return Outcome(
        outputs=tuple(picture_of(work, index) for index in range(request.num_outputs)),
        logs=f"fake: seed {request.seed}\n",
        metrics={"model": "fake", "seeds": request.seeds},
    )


class FakeEngines:
    """A number of engines, each with the work that it has.

    Attributes:
        num_ready, capacity: as Engines has them.
        running: per engine the work that it has, by id, and the future that ends it.
        asked: the id of each work that was given to an engine, in order.
        works: those works.
        cancelled: the ids of those that were cancelled.
        num_deaths: how many engines died.

    Args:
        num_engines: those that are ready.
        each: how much work an engine may have.
        is_held: whether work stays with its engine until a test ends it.
        answer: what the engines say of work that is not held.
        killers: the prompts that kill an engine as soon as it has them, and everything else has
            begun. A dead engine is replaced at once.
        is_in_process: as Engines has it.
    """

    def __init__(
        self,
        num_engines: int = 1,
        each: int = 64,
        is_held: bool = False,
        answer: Callable[[Work], Outcome] = answer_to,
        killers: Collection[str] = (),
        is_in_process: bool = True,
    ) -> None:
        self.is_in_process = is_in_process
        self.is_held, self.answer, self.killers, self._each = is_held, answer, killers, each
        self.running: list[dict[str, asyncio.Future[Outcome]]] = []
        self.asked: list[str] = []
        self.works: list[Work] = []
        self.cancelled: list[str] = []
        self.num_deaths = 0
        self._changed = asyncio.Event()
        self.num_ready = self.capacity = 0
        self.set_ready(num_engines)

    def set_ready(self, num_engines: int) -> None:
        """Have so many engines from now on; those that go must have no work."""
        assert not any(self.running[num_engines:])
        self.running = [*self.running[:num_engines]]
        self.running += [{} for _ in range(num_engines - len(self.running))]
        self.num_ready, self.capacity = num_engines, num_engines * self._each
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def under_way(self) -> dict[str, asyncio.Future[Outcome]]:
        """The work that engines have, by id."""
        return {id: future for engine in self.running for id, future in engine.items()}

    def finish(self, id: str, outcome: Outcome | None = None) -> None:
        """End work that is held, with its own answer if no other is given."""
        work = next(each for each in reversed(self.works) if each.id == id)
        self.under_way[id].set_result(self.answer(work) if outcome is None else outcome)

    def fail(self, id: str, error: BaseException) -> None:
        """End work that is held by an exception."""
        self.under_way[id].set_exception(error)

    def kill(self, engine: int = 0) -> None:
        """End an engine, and with it all that it has; another takes its place."""
        dead, self.running[engine] = self.running[engine], {}
        self.num_deaths += 1
        for future in dead.values():
            if not future.done():
                future.set_exception(EngineDiedError("killed"))

    async def card(self) -> ModelCard:
        """As Engines has it."""
        while self.num_ready == 0:
            await self.changed()
        return CARD

    async def changed(self) -> None:
        """As Engines has it."""
        await self._changed.wait()

    async def run(self, work: Work) -> Outcome:
        """As Engines has it."""
        assert len(self.under_way) < self.capacity, "more than the engines may have"
        assert work.id not in self.under_way, "twice at the same time"
        engine = min(self.running, key=len)
        future = engine[work.id] = asyncio.get_running_loop().create_future()
        self.asked.append(work.id)
        self.works.append(work)
        try:
            if work.request.prompt in self.killers:
                await settled(_TURNS)
                self.kill(next(i for i, each in enumerate(self.running) if each is engine))
            elif not self.is_held:
                await settled(_TURNS)
                if not future.done():
                    future.set_result(self.answer(work))
            return await future
        except asyncio.CancelledError:
            self.cancelled.append(work.id)
            raise
        finally:
            engine.pop(work.id, None)

    async def close(self) -> None:
        """As Engines has it."""
        self.set_ready(0)


async def settled(num_turns: int = 40) -> None:
    """Let everything that can go on without a thread's or a test's doing go on."""
    for _ in range(num_turns):
        await asyncio.sleep(0)


def work(id: str, prompt: str = "a cat", seed: int = 7, **inputs: Any) -> Work:
    """Work of an id; LoRAs and their tokens by their inputs' names."""
    loras = LoraInputs.taken_from(inputs)
    return Work(id, GenerationRequest.resolve(CARD, prompt=prompt, seed=seed, **inputs), loras)


def prediction(
    id: str, prompt: str = "a cat", seed: int = 7, is_journaled: bool = False, **inputs: Any
) -> Prediction:
    """A prediction in Cog's dialect, or in Replicate's if it is journaled."""
    given = {"prompt": prompt, "seed": seed, **inputs}
    return Prediction(
        id=id,
        dialect="replicate" if is_journaled else "cog",
        inputs=given,
        work=work(id, **given),
        is_journaled=is_journaled,
    )
