"""Which images run in the next step. No torch: an image here is anything with a job."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

Image = TypeVar("Image")


class FirstComeFirstServed(Generic[Image]):
    """The images of the oldest request run together, step after step, until none is left."""

    def __init__(self) -> None:
        self._requests: deque[list[Image]] = deque()

    def __bool__(self) -> bool:
        """Whether any image still has a step to run."""
        return bool(self._requests)

    def add(self, images: Sequence[Image]) -> None:
        """Queue the images of one request, which may share a batch."""
        self._requests.append(list(images))

    def next_batch(self) -> list[Image]:
        """The images that run next, at least one; they stay queued until removed."""
        return list(self._requests[0])

    def remove(self, image: Image) -> None:
        """Take out an image that is finished, has failed or is no longer wanted."""
        for request in self._requests:
            if image in request:
                request.remove(image)
                break
        self._requests = deque(request for request in self._requests if request)
