"""Units of work as the engine has them, for whoever times them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, islice

from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline, Sample


class Work:
    """Requests of the model's own size, with a prompt of their own each, so that none is known.

    Args:
        pipeline: that does them.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._numbers = count()
        self._known = self.requests(1)
        (self._conditioning,) = pipeline.encode(self._known)

    def requests(self, batch: int) -> list[GenerationRequest]:
        """So many, of one image each."""
        return [
            GenerationRequest.resolve(
                self.pipeline.card, prompt=f"lighthouse {number} in a storm", seed=number
            )
            for number in islice(self._numbers, batch)
        ]

    def noise(self, batch: int) -> list[Sample]:
        """So many images before their first step, of a prompt that is known."""
        return [self.pipeline.start(self._known[0], 0, self._conditioning) for _ in range(batch)]

    def latents(self, batch: int) -> list[Sample]:
        """So many images after their last step."""
        samples = self.noise(batch)
        while not samples[0].trajectory.done:
            self.pipeline.step(samples)
        return samples

    def images(self, requests: Sequence[GenerationRequest]) -> None:
        """All of it, from prompts to pixels on the host."""
        encoded = zip(requests, self.pipeline.encode(requests), strict=True)
        samples = [self.pipeline.start(request, 0, each) for request, each in encoded]
        while not samples[0].trajectory.done:
            self.pipeline.step(samples)
        for picture in self.pipeline.decode(samples):
            picture.pixels()
