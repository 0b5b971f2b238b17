"""How journaled predictions ended: on the disk, or in memory where the disk refuses."""

from __future__ import annotations

import logging
from dataclasses import replace

from deploy.gateway.keeping.journal import Journal
from deploy.gateway.keeping.outputs import OutputsError
from deploy.gateway.life.life import End, Life
from deploy.gateway.prediction import Prediction
from deploy.gateway.work import Outcome

log = logging.getLogger(__name__)

MAX_UNWRITTEN = 1000


class KeptEnds:
    """The journal's ends, and the latest MAX_UNWRITTEN that it could not be told of.

    Of the latter, those who ask hear how it ended for as long as this gateway runs. For the next
    one they are unfinished, and are done again.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._unwritten: dict[str, Prediction] = {}

    def find(self, id: str) -> Prediction | None:
        """The one of this id."""
        return self._unwritten.get(id) or self._journal.find(id)

    def known(self, written: Prediction) -> Prediction:
        """What is known of one that the journal has."""
        return self._unwritten.get(written.id, written)

    def forget(self, id: str) -> None:
        """Let a new prediction have this id."""
        self._unwritten.pop(id, None)

    async def write(self, life: Life, ended: Prediction) -> Prediction:
        """Write an end and its outputs; as it is on the disk, "failed" if outputs cannot be."""
        outcome = ended.outcome or Outcome()
        try:
            ended = replace(ended, files=await self._journal.outputs.keep(outcome.outputs))
        except OutputsError as error:
            log.error("prediction %s: %s", ended.id, error)
            ended = life.ended(End.of(replace(outcome, outputs=(), error=str(error))))
        try:
            await self._journal.finished(ended)
        except Exception:  # whatever it is, who waits must hear of the end
            log.exception("the end of prediction %s is in memory alone", ended.id)
            self._remember(ended)
        return ended

    def _remember(self, ended: Prediction) -> None:
        outcome = replace(ended.outcome or Outcome(), outputs=())
        self._unwritten[ended.id] = replace(ended, outcome=outcome)
        while len(self._unwritten) > MAX_UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]
