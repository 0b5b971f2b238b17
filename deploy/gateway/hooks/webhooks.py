"""Tells receivers of predictions: signed, in order, and without anybody waiting for it.

Each prediction's messages are sent one after another. The last one, `completed`, is tried again for
five minutes until it is taken, and anew after a restart if the journal has it. The others are sent
once. Whoever is slow, or away, holds up its own host's alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

from deploy.gateway.hooks.webhook_hosts import Receiver, WebhookHosts
from deploy.gateway.hooks.webhook_messages import Backlog, Line, Message, Pace, as_it_stands
from deploy.gateway.hooks.webhook_post import Poster, PostError
from deploy.gateway.hooks.webhook_secret import message_id, webhook_secret
from deploy.gateway.keeping.journal import Journal
from deploy.gateway.prediction import Dialect, Event, Prediction
from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error, InvalidRequestError

log = logging.getLogger(__name__)

# A prediction as its dialect says it, with its outputs.
Body = Callable[[Prediction], Awaitable[bytes]]
_NEWS: tuple[Event, ...] = ("output", "logs")


class Webhooks:
    """All webhooks of a gateway. Used on the event loop's thread alone.

    Attributes:
        hosts: whom it may tell.
        secret: that signs; Replicate's dialect shows it to those who bear the API token.
        counts: messages by event and by what became of them: "delivered", "failed", "dropped".

    Args:
        journal: knows whose end was told, across restarts.
        bodies: per dialect, what is sent.
        poster, pace: for tests; production takes the defaults.

    Raises:
        DMD2Error: a setting is wrong, or the secret cannot be kept.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        journal: Journal,
        bodies: Mapping[Dialect, Body],
        poster: Poster | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.hosts = WebhookHosts(settings.webhook_hosts)
        self.secret = webhook_secret(settings.webhook_secret, journal.folder)
        self.counts: Counter[tuple[Event, str]] = Counter()
        self._journal, self._bodies = journal, bodies
        self._poster, self._pace = poster or Poster(), pace or Pace()
        self._backlogs = {origin: Backlog(self._pace) for origin in self.hosts.origins}
        self._lines: dict[tuple[str, datetime], Line] = {}
        self._is_behind = False

    def resume(self) -> None:
        """Tell of the ends that an earlier gateway did not get told; call it once, at the start."""
        self._is_behind = False
        for prediction in self._journal.untold():
            line = self._lines.get(_key(prediction))
            if line is None or line.lacks_end:
                self.tell(prediction, "completed")

    def tell(self, prediction: Prediction, event: Event) -> None:
        """Have the prediction's receiver told, as things stand now; returns at once."""
        if prediction.webhook is None or (receiver := self._receiver(prediction)) is None:
            return
        line = self._lines.setdefault(_key(prediction), Line())
        if self._is_wanted(line, prediction.webhook.events, event):
            line.num_told += 1
            number = 0 if event == "completed" else line.num_told  # the same after a restart
            id = message_id(prediction.id, prediction.created_at.isoformat(), event, number)
            self._put(line, Message(id, event, as_it_stands(prediction), receiver))

    async def drain(self, timeout_s: float) -> None:
        """Send what waits, for so many seconds; what is left of the journal's is sent next time."""
        if tasks := self._tasks():
            await asyncio.wait(tasks, timeout=timeout_s)
        left = self._tasks()
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._poster.close()

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [line.task for line in self._lines.values() if line.task is not None]

    def _receiver(self, prediction: Prediction) -> Receiver | None:
        """Whom to tell; None where the list does not allow it any more, since a restart."""
        assert prediction.webhook is not None
        try:
            return self.hosts.receiver(prediction.webhook.url)
        except InvalidRequestError as error:
            log.warning("nobody is told of prediction %s: %s", prediction.id, error.limit)
            return None

    def _is_wanted(self, line: Line, events: tuple[Event, ...], event: Event) -> bool:
        """Whether it goes into the line. The end does in any case, to be noted as told."""
        if event == "completed":
            return not line.has_end
        if event not in events:
            return False
        if event in _NEWS:
            now = asyncio.get_running_loop().time()
            if line.news_at is not None and now - line.news_at < self._pace.news_every_s:
                return False
            line.news_at = now
        return True

    def _put(self, line: Line, message: Message) -> None:
        is_end = message.event == "completed"
        if self._backlogs[message.receiver.origin].take(message):
            line.has_end, line.lacks_end = is_end, False
            line.messages.append(message)
            if line.task is None:
                line.task = asyncio.create_task(self._send_all(line))
        elif is_end and message.prediction.is_journaled:
            self._is_behind = line.lacks_end = True
        else:
            line.has_end = is_end
            self._count(message, "dropped", "too many wait already")
        if is_end and line.task is None:
            self._lines.pop(_key(message.prediction))

    async def _send_all(self, line: Line) -> None:
        """Send a prediction's messages until none is left."""
        while line.messages:
            message = line.messages[0]
            backlog = self._backlogs[message.receiver.origin]
            try:
                await self._send(message, backlog)
            except Exception:  # the next one may be sent all the same
                log.exception("%s of prediction %s", message.event, message.prediction.id)
            line.messages.popleft()
            backlog.leave(message)
        line.task = None
        if line.has_end or line.lacks_end:
            self._lines.pop(_key(message.prediction))
        if self._is_behind and backlog.is_low:
            self.resume()

    async def _send(self, message: Message, backlog: Backlog) -> None:
        """Send one, again and again if it is the end, and note that it was told."""
        prediction, is_end = message.prediction, message.event == "completed"
        if prediction.webhook is not None and message.event in prediction.webhook.events:
            why = await self._try(message, backlog)
            for pause_s in self._pace.pauses_s() if is_end else ():
                if why is None:
                    break
                await asyncio.sleep(pause_s)
                why = await self._try(message, backlog)
            self._count(message, "delivered" if why is None else "failed", why)
        if is_end and prediction.is_journaled:
            await self._journal.told(prediction)

    async def _try(self, message: Message, backlog: Backlog) -> str | None:
        """Send it once; why that could not be done, None where it was."""
        async with backlog.slots:
            try:
                body = await self._bodies[message.prediction.dialect](message.prediction)
                headers = self.secret.headers(message.id, int(time.time()), body)
                await self._poster.post(message.receiver, headers, body)
            except (PostError, DMD2Error) as error:
                return str(error)
        return None

    def _count(self, message: Message, became: str, why: str | None) -> None:
        self.counts[message.event, became] += 1
        if why is not None:
            host = message.receiver.host
            log.warning("%s: %s of %s: %s", host, message.event, message.prediction.id, why)


def _key(prediction: Prediction) -> tuple[str, datetime]:
    """What tells predictions apart; an id may be given again."""
    return prediction.id, prediction.created_at
