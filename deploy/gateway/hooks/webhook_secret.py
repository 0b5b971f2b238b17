"""The secret that signs webhooks, and the signatures, as Standard Webhooks and Replicate have them.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from dmd2.errors import DMD2Error

FILE = "webhook-secret"
PREFIX = "whsec_"
MIN_KEY_BYTES, MAX_KEY_BYTES, NEW_KEY_BYTES = 16, 64, 32


@dataclass(frozen=True)
class WebhookSecret:
    """A secret that a receiver knows too.

    Attributes:
        text: "whsec_" and 16 to 64 bytes in base64.
        source: what messages call it.

    Raises:
        DMD2Error: it is none; the message does not show it.
    """

    text: str = field(repr=False)
    source: str = "DMD2_WEBHOOK_SECRET"

    def __post_init__(self) -> None:
        if not MIN_KEY_BYTES <= len(self._key()) <= MAX_KEY_BYTES:
            raise DMD2Error(
                f"{self.source} is not {PREFIX} and {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes in "
                f'base64; `echo "{PREFIX}$(openssl rand -base64 32)"` makes one'
            )

    def headers(self, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """What a message bears.

        Args:
            message_id: the same for each try to send it.
            timestamp: of this try, in seconds since 1970.
            body: as it is sent.
        """
        content = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
        signature = hmac.new(self._key(), content, hashlib.sha256).digest()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
        }

    def _key(self) -> bytes:
        """The bytes; none where it is no secret."""
        if not self.text.startswith(PREFIX):
            return b""
        try:
            return base64.b64decode(self.text.removeprefix(PREFIX), validate=True)
        except ValueError:  # also when it is no ASCII
            return b""


def webhook_secret(given: str, folder: Path) -> WebhookSecret:
    """The secret that is given, or the folder's own, which is made where there is none.

    Args:
        given: of DMD2_WEBHOOK_SECRET; "" for none.
        folder: of this gateway alone.

    Raises:
        DMD2Error: it is no secret, or the file cannot be read or written.
    """
    if given:
        return WebhookSecret(given)
    path = folder / FILE
    try:
        if not path.exists():
            _write_new(path)
        return WebhookSecret(path.read_text(encoding="ascii").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DMD2Error(f"{path}, the secret of webhooks, cannot be had: {error}") from error


def message_id(*parts: object) -> str:
    """An id for what these tell apart: the same before and after a restart, and of nothing else."""
    content = "\n".join(map(str, parts))
    return f"msg_{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _write_new(path: Path) -> None:
    """Write it whole and for its owner alone, or not at all."""
    text = PREFIX + base64.b64encode(secrets.token_bytes(NEW_KEY_BYTES)).decode()
    temporary = path.with_suffix(".part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
