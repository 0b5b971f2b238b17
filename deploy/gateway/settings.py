"""The environment variables that the gateway reads: its own, and some of the engine's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dmd2.errors import DMD2Error
from dmd2.settings import Settings

MAX_QUEUED = 1_000_000
_CELL = re.compile(r"[A-Za-z0-9]{1,16}")


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway runs.

    Attributes:
        api_token: DMD2_API_TOKEN, that every request must bear; "" for none, on loopback alone.
        max_queued: DMD2_MAX_QUEUED, how many predictions may wait for an engine.
        journal_dir: DMD2_JOURNAL_DIR, where accepted predictions and their outputs are kept.
        public_url: DMD2_PUBLIC_URL, https, below which Replicate's dialect names outputs; "" has
            it send them as data: URLs.
        webhook_hosts: DMD2_WEBHOOK_HOSTS, a comma list of the hosts that may be told, each with
            http:// before it where it may be told without TLS, and :port behind it where that is
            not the usual one; empty refuses webhooks. Names must lead to public addresses;
            localhost, and what is listed by its address, need not.
        webhook_secret: DMD2_WEBHOOK_SECRET, "whsec_" and base64, which signs them; "" has the
            gateway make one and keep it beside the journal.
        serves: DMD2_SERVES, a comma list of the owner/name that Replicate's dialect answers to;
            empty answers to all, since there is one model.
        cell: DMD2_CELL, what the ids that this gateway gives begin with.
        queue_timeout_s, run_timeout_s: the engine's DMD2_QUEUE_TIMEOUT_S and DMD2_RUN_TIMEOUT_S,
            which together bound a prediction's life, all tries and the gateway's queue included.
        keep_outputs_s: DMD2_KEEP_OUTPUTS_S, the age at which the journal's outputs and inputs go.
        max_output_bytes: DMD2_MAX_OUTPUT_BYTES, that those outputs may take together, beside the
            engine's own; None ("auto") is half of what the disk has free at the start.
    """

    api_token: str = field(default="", repr=False)
    max_queued: int = 1000
    journal_dir: Path = Path.home() / ".local" / "state" / "dmd2-gateway"
    public_url: str = ""
    webhook_hosts: tuple[str, ...] = ()
    webhook_secret: str = field(default="", repr=False)
    serves: tuple[str, ...] = ()
    cell: str = ""
    queue_timeout_s: float = Settings.queue_timeout_s
    run_timeout_s: float = Settings.run_timeout_s
    keep_outputs_s: float = Settings.keep_outputs_s
    max_output_bytes: int | None = Settings.max_output_bytes

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> GatewaySettings:
        """The settings that environ asks for.

        Raises:
            DMD2Error: a variable holds what it may not, one of the engine's among them.
        """
        # The engine has its own word on which model that is, and need not be in this process.
        engine = Settings.from_environment({"DMD2_MODEL": "any", **environ})
        max_queued = environ.get("DMD2_MAX_QUEUED", str(cls.max_queued))
        if not max_queued.isascii() or not max_queued.isdigit() or int(max_queued) > MAX_QUEUED:
            raise DMD2Error(
                f"DMD2_MAX_QUEUED={max_queued!r} is not a number from 0 to {MAX_QUEUED}"
            )
        public_url = environ.get("DMD2_PUBLIC_URL", "").rstrip("/")
        if public_url and not public_url.startswith("https://"):
            raise DMD2Error(
                f"DMD2_PUBLIC_URL={public_url!r} does not begin with https://, which Replicate's "
                "clients ask for; left out, outputs are data: URLs"
            )
        cell = environ.get("DMD2_CELL", "")
        if cell and not _CELL.fullmatch(cell):
            raise DMD2Error(f"DMD2_CELL={cell!r} is not 1 to 16 letters and digits")
        return cls(
            api_token=environ.get("DMD2_API_TOKEN", ""),
            max_queued=int(max_queued),
            journal_dir=Path(environ.get("DMD2_JOURNAL_DIR") or cls.journal_dir),
            public_url=public_url,
            webhook_hosts=_listed(environ.get("DMD2_WEBHOOK_HOSTS", "")),
            webhook_secret=environ.get("DMD2_WEBHOOK_SECRET", ""),
            serves=_listed(environ.get("DMD2_SERVES", "")),
            cell=cell,
            queue_timeout_s=engine.queue_timeout_s,
            run_timeout_s=engine.run_timeout_s,
            keep_outputs_s=engine.keep_outputs_s,
            max_output_bytes=engine.max_output_bytes,
        )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
