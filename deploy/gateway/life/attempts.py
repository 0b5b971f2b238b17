"""One try of a prediction: counted, written down, given to an engine."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from deploy.gateway.keeping.journal import Journal, Unfinished
from deploy.gateway.keeping.journal_file import JournalError
from deploy.gateway.keeping.kept_work import WorkLostError
from deploy.gateway.life.life import End, Life
from deploy.gateway.life.waiting_line import MAX_ATTEMPTS, is_last_try
from deploy.gateway.prediction import Event, Prediction
from deploy.gateway.work import EngineDiedError, Engines, Outcome, Work
from dmd2.errors import DMD2Error

log = logging.getLogger(__name__)

END_OF_ATTEMPTS = End.of(
    Outcome(
        error=f"each of {MAX_ATTEMPTS} tries was cut by the end of the engine, or of the gateway, "
        "the last one with nothing else under way; the request may be what ends them, so change "
        "it before you send it again"
    )
)


class Attempts:
    """Gives work to engines, and tells an engine's word from an engine's death.

    Attributes:
        counts: how often an engine was given work, by why: "new", "resumed" after a restart,
            "engine_died" or, where it is the last time, "alone".
    """

    def __init__(
        self, engines: Engines, journal: Journal, tell: Callable[[Prediction, Event], None]
    ) -> None:
        self._engines, self._journal, self._tell = engines, journal, tell
        self.counts: Counter[str] = Counter()

    async def make(self, life: Life) -> End | None:
        """How it ended; None where the engine died and another is to try it.

        Of one that was stopped meanwhile, this may be either.
        """
        if life.last_word is not None:
            return life.last_word
        life.run = asyncio.create_task(self._outcome(life))
        try:
            return End.of(await life.run)
        except (EngineDiedError, asyncio.CancelledError):
            me = asyncio.current_task()
            if me is not None and me.cancelling():  # the gateway itself is being stopped
                raise
            return END_OF_ATTEMPTS if life.num_attempts >= MAX_ATTEMPTS else None
        except DMD2Error as error:
            return End.of(Outcome(error=str(error)))
        except Exception as error:
            log.exception("prediction %s could not be given to an engine", life.prediction.id)
            said = f"the gateway could not give it to an engine ({type(error).__name__})"
            return End.of(Outcome(error=f"{said}; its log says more"))
        finally:
            life.run = None

    async def _outcome(self, life: Life) -> Outcome:
        prediction, why = life.prediction, _why(life)
        work = await self._work(life)
        self.counts[why] += 1
        is_first = life.begin_attempt()
        if prediction.is_journaled:
            await self._write(prediction)
        if is_first:
            self._tell(prediction, "start")
        return await self._engines.run(work)

    async def _write(self, prediction: Prediction) -> None:
        """Write a try down before it is made; where that fails, the next gateway knows less."""
        num_attempts = prediction.num_attempts - (0 if self._engines.is_in_process else 1)
        try:
            await self._journal.tried(prediction, num_attempts)
        except JournalError as error:
            log.error("a try of prediction %s is not in the journal: %s", prediction.id, error)

    async def _work(self, life: Life) -> Work:
        """The work, made again where an earlier gateway accepted it."""
        prediction = life.prediction
        if prediction.work is None:
            assert life.kept is not None
            card = await self._engines.card()
            prediction.work = life.kept.restored(prediction.id, card)
        return prediction.work


def _why(life: Life) -> str:
    """Why an engine is given it now."""
    if is_last_try(life):
        return "alone"
    if life.prediction.work is None:
        return "resumed"
    return "engine_died" if life.num_attempts else "new"


def end_of(unfinished: Unfinished) -> End | None:
    """How one that an earlier gateway accepted ends at once; None where it is to be tried."""
    if unfinished.prediction.num_attempts >= MAX_ATTEMPTS:
        return END_OF_ATTEMPTS
    try:
        unfinished.work.check()
    except WorkLostError as error:
        return End.of(Outcome(error=str(error)))
    return None


def too_late(limit_s: float, num_attempts: int, is_any_ready: bool) -> End:
    """How one ends that its deadline has overtaken."""
    why = "" if is_any_ready else ", and no engine is ready now"
    return End.of(
        Outcome(
            error="it was not done within DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S together, "
            f"which are {limit_s:g} s; it was given to an engine {num_attempts} times{why}"
        )
    )
