"""The life of predictions: accepted, waiting, with an engine, with another if that died, over.

A prediction is accepted or refused at once. Those that wait are sent in the order of acceptance,
as soon as the engines have room. What an engine says is the end; if it dies instead, its work goes
back to its place in the line, twice at most, and the last time it is tried alone (`waiting_line`).
A caller may cancel at any time until an engine has spoken.

One deadline bounds it all: DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S together, from acceptance
on, or from the start of the gateway that found it unfinished. It runs on while no engine is ready,
so that everybody hears of an end in bounded time. For each try an engine has both limits besides.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from deploy.gateway.keeping.journal import Journal
from deploy.gateway.life.attempts import Attempts, end_of, too_late
from deploy.gateway.life.kept_ends import KeptEnds
from deploy.gateway.life.life import CANCELED, End, Life
from deploy.gateway.life.pace import Pace
from deploy.gateway.life.refusals import DrainingError, IdInUseError, QueueFullError
from deploy.gateway.life.waiting_line import WaitingLine
from deploy.gateway.prediction import Dialect, Event, Prediction, Status
from deploy.gateway.settings import GatewaySettings
from deploy.gateway.work import Engines

log = logging.getLogger(__name__)

_STOP_S = 10.0


class Predictions:
    """All predictions of a gateway. Used on the event loop's thread alone.

    At its end a prediction is forgotten here: whoever wants to know holds the Prediction, or finds
    it in the journal if it is journaled.

    Attributes:
        is_draining: whether new ones are refused.
        attempts: how often engines were given work, by why (`attempts`).
        ended: how many came to their end, by dialect and status.

    Args:
        tell: hears at once of each prediction's start, outputs, logs and end; must not block.
    """

    def __init__(
        self,
        engines: Engines,
        settings: GatewaySettings,
        journal: Journal,
        tell: Callable[[Prediction, Event], None],
    ) -> None:
        self._engines, self._journal, self._tell = engines, journal, tell
        self._attempts = Attempts(engines, journal, self._told)
        self._kept_ends = KeptEnds(journal)
        self._max_queued = settings.max_queued
        self._limit_s = settings.queue_timeout_s + settings.run_timeout_s
        self._lives: dict[str, Life] = {}
        self._line: WaitingLine[Life] = WaitingLine()
        self._num_arriving = 0
        self._places = itertools.count()
        self._watch: asyncio.Task[None] | None = None
        self._pace = Pace()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False
        self.attempts = self._attempts.counts
        self.ended: Counter[tuple[Dialect, Status]] = Counter()

    @property
    def num_queued(self) -> int:
        """How many wait for an engine, or to be written first."""
        return len(self._line) + self._num_arriving

    @property
    def num_under_way(self) -> int:
        """How many were accepted and have not come to their end."""
        return len(self._lives)

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may, beside those that engines have room for."""
        return self.num_queued >= self._max_queued + self._line.room(self._engines.capacity)

    async def resume(self) -> None:
        """Take up again what the journal has unfinished; call it before anything is accepted."""
        for unfinished in self._journal.unfinished():
            life = self._begin(unfinished.prediction)
            life.kept, life.last_word = unfinished.work, end_of(unfinished)
            self._enter(life)

    async def accept(self, prediction: Prediction, end: End | None = None) -> None:
        """Let a prediction wait for its turn; what is journaled is on the disk on return.

        An older one of its id is not, whatever this one is. If the caller is cancelled while the
        disk is written, it has been accepted all the same.

        Args:
            prediction: the one.
            end: that it comes to at once, where no engine is to have it.

        Raises:
            QueueFullError: as many wait as may, beside those that engines have room for.
            DrainingError: after drain was called.
            IdInUseError: one of this id is under way.
            JournalError: the disk refuses that, and it is not accepted.
        """
        if self.is_draining:
            raise DrainingError
        if prediction.id in self._lives:
            raise IdInUseError(prediction.id)
        if self.is_full:
            raise QueueFullError(self._pace.retry_after_s(self.num_queued))
        is_written = prediction.is_journaled or self._journal.find(prediction.id) is not None
        life = self._begin(prediction)
        life.last_word = end
        if is_written:
            life.task = asyncio.create_task(self._write_first(life))
            await asyncio.shield(life.task)
        else:
            self._enter(life)

    def find(self, id: str) -> Prediction | None:
        """The prediction of this id, if it is under way or was journaled."""
        if (life := self._lives.get(id)) is not None:
            return life.prediction
        return self._kept_ends.find(id)

    def is_under_way(self, id: str) -> bool:
        """Whether a prediction of this id was accepted and has not come to its end."""
        return id in self._lives

    def page(self, cursor: str | None) -> tuple[list[Prediction], str | None, str | None]:
        """Journaled predictions, newest first, and the cursors of those newer and older.

        Raises:
            InvalidRequestError: the cursor is none that this gave.
        """
        found, newer, older = self._journal.page(cursor)
        return [self._known(each) for each in found], newer, older

    def cancel(self, id: str) -> bool:
        """Let a prediction end as "canceled", soon; False if none is under way, or it is ending."""
        life = self._lives.get(id)
        if life is None or life.stage == "ending":
            return False
        self._stop(life, CANCELED)
        return True

    async def wait(self, prediction: Prediction, timeout_s: float | None) -> None:
        """Return at a prediction's end, or after timeout_s seconds if that is earlier."""
        with suppress(TimeoutError):
            await asyncio.wait_for(prediction.ended.wait(), timeout_s)

    async def drain(self) -> None:
        """Refuse new ones from now on, and return when all that were accepted are over."""
        self.is_draining = True
        await self._is_idle.wait()

    async def stop(self) -> None:
        """Leave what is under way to the next gateway; what is ending already comes to its end.

        Call it before engines are closed, which then look like dead ones. Engines are told to
        cancel what they have. Of what is not journaled nobody hears any more.
        """
        self.is_draining = True
        self._line.fresh.clear()
        self._line.suspects.clear()
        lives = list(self._lives.values())
        for life in lives:
            life.disarm()
            if life.task is not None and life.stage != "ending" and life.last_word is None:
                life.task.cancel()
        tasks = [life.task for life in lives if life.task is not None]
        if self._watch is not None:
            self._watch.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_S)
        self._is_idle.set()

    def _known(self, prediction: Prediction) -> Prediction:
        """What is known of a prediction beyond what the journal has."""
        if (life := self._lives.get(prediction.id)) is not None:
            return life.prediction
        return self._kept_ends.known(prediction)

    def _begin(self, prediction: Prediction) -> Life:
        life = self._lives[prediction.id] = Life(prediction, next(self._places))
        self._num_arriving += 1
        self._is_idle.clear()
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_engines())
        return life

    async def _watch_engines(self) -> None:
        """Send what waits whenever the engines have more room than they had."""
        while True:
            self._send()
            await self._engines.changed()

    async def _write_first(self, life: Life) -> None:
        prediction, end = life.prediction, life.last_word
        try:
            await self._journal.accepted(prediction if end is None else life.ended(end))
        except Exception:
            self._num_arriving -= 1
            self._forget(life)
            raise
        self._kept_ends.forget(prediction.id)
        self._enter(life)

    def _enter(self, life: Life) -> None:
        """Let it wait for its turn, unless its end has come already."""
        self._num_arriving -= 1
        life.stage = "under way"
        loop = asyncio.get_running_loop()
        life.timer = loop.call_later(self._limit_s, self._stop_late, life)
        if life.last_word is not None:
            life.task = asyncio.create_task(self._end(life, life.last_word))
        else:
            self._line.put(life)
            self._send()

    def _stop(self, life: Life, end: End) -> None:
        """Have it come to this end, where no other was decided on before."""
        if life.last_word is not None or life.stage == "ending":
            return
        life.last_word = end
        if self._line.remove(life):
            life.task = asyncio.create_task(self._end(life, end))
            self._send()  # it may have been a suspect that others waited for
        elif life.run is not None:
            life.run.cancel()

    def _stop_late(self, life: Life) -> None:
        is_any_ready = self._engines.num_ready > 0
        self._stop(life, too_late(self._limit_s, life.num_attempts, is_any_ready))

    def _send(self) -> None:
        """Give engines what they have room for."""
        while (life := self._line.take(self._engines.capacity)) is not None:
            life.task = asyncio.create_task(self._see_to(life))

    async def _see_to(self, life: Life) -> None:
        """Try it once, and see it to its end or back into the line."""
        end = await self._attempts.make(life)
        if life.last_word is not None:
            end = life.last_word
        if end is None:
            self._line.put(life)
        else:
            await self._end(life, end)
        self._send()

    async def _end(self, life: Life, end: End) -> None:
        """Write the end where it is journaled, then let everybody know."""
        life.stage = "ending"
        life.disarm()
        ended = life.ended(end)
        if ended.is_journaled:
            ended = await self._kept_ends.write(life, ended)
        life.become(ended)
        self._line.leave(life)
        self._forget(life)
        self._pace.count_end()
        self.ended[ended.dialect, ended.status] += 1
        for event in life.events_of_end():
            self._told(life.prediction, event)

    def _forget(self, life: Life) -> None:
        del self._lives[life.prediction.id]
        if not self._lives:
            self._is_idle.set()
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

    def _told(self, prediction: Prediction, event: Event) -> None:
        try:
            self._tell(prediction, event)
        except Exception:  # whoever listens must not hold up what runs
            log.exception("nobody was told of %s of prediction %s", event, prediction.id)
