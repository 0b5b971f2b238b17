"""Why a prediction is not accepted, beyond what is wrong with itself."""

from __future__ import annotations

from dmd2.errors import DMD2Error


class QueueFullError(DMD2Error):
    """As many predictions wait as may.

    Attributes:
        retry_after_s: when there may be room again, in whole seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "as many predictions wait as DMD2_MAX_QUEUED allows; try again in "
            f"{retry_after_s} seconds"
        )


class DrainingError(DMD2Error):
    """The gateway is coming to its end, and takes nothing new."""

    def __init__(self) -> None:
        super().__init__("the gateway is about to end, and takes nothing new; try again later")


class IdInUseError(DMD2Error):
    """A prediction of this id is under way."""

    def __init__(self, id: str) -> None:
        super().__init__(f"a prediction with the id {id} is under way; use another id, or none")
