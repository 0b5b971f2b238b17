"""The kinds of work that the device is given, as a table: what an image still needs, and how.

An image always waits for the first kind in the table that it needs, and is finished when it needs
none. So a further kind is a row here, the function that runs it, and a field of JobImage if nothing
else tells whether an image has passed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmd2.engine.job import JobImage
from dmd2.loras.names import MODEL_PARTS
from dmd2.request.lane import Lane
from dmd2.sampling.pipeline import Pipeline
from dmd2.sampling.sample import Sample


class Finished(NamedTuple):
    """An image that needs the device no more.

    Attributes:
        pixels: uint8 [H, W, 3].
        nsfw_score: the safety checker's; NaN where it failed, None where it was not asked.
        checked: whether the score counts.
    """

    pixels: NDArray[np.uint8]
    nsfw_score: float | None
    checked: bool


# Waits until the device has done an image's part of a unit of work; what has left the device.
Finish = Callable[[JobImage], Finished | None]


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of work for the device.

    Attributes:
        name: as the log says it.
        is_needed_by: whether an image is yet to pass it.
        run: gives the device the work of images of one lane, and does not wait for it.
        cost: of one image, in pixels that pass the UNet, by which lanes share the device.
        max_batch: how many images share it where nothing was measured.
        ready_cost: of making their lane ready for it, likewise; 0 where it is.
        goes_first: whether it runs before whatever else its lane waits for.
    """

    name: str
    is_needed_by: Callable[[JobImage], bool]
    run: Callable[[Pipeline, Sequence[JobImage]], Finish]
    cost: Callable[[Lane], float]
    max_batch: int
    ready_cost: Callable[[Pipeline, Sequence[JobImage]], float] = lambda _pipeline, _images: 0.0
    goes_first: bool = False

    def __str__(self) -> str:
        return self.name


def run_step(pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
    """Take each image one step further, whatever the step that each is at."""
    _encode_new(pipeline, images)
    samples = [_sample_of(pipeline, image) for image in images]
    pipeline.step(samples)
    wait = pipeline.mark()
    for job in {image.job for image in images}:
        job.batch_sizes.append(len(images))
    sampled = {image for image in images if not needs_step(image)}
    errors: list[Exception] = []

    def finish(image: JobImage) -> None:
        try:
            wait()
        except Exception as error:  # of the unit as a whole, whatever a second wait would say
            errors.append(error)
        if errors:
            raise errors[0]
        if image in sampled:
            image.job.ended("sample")

    return finish


def run_decode(pipeline: Pipeline, images: Sequence[JobImage]) -> Finish:
    """Turn the latents of images that have taken all their steps into pictures."""
    samples = [image.sample for image in images if image.sample is not None]
    pictures = dict(zip(images, pipeline.decode(samples), strict=True))
    for image in images:
        image.is_decoded = True

    def finish(image: JobImage) -> Finished | None:
        picture = pictures[image]
        image.job.ended("decode", at=picture.decoded())
        if image.job.over:  # what is not finite would be made again, for nobody, while all wait
            return None
        pixels, nsfw_score = picture.result()
        if image.sample is not None:  # made again or not, by now it is known what made it
            image.job.note_ways(image.sample.ways)
        image.job.ended("check")
        return Finished(pixels, nsfw_score, picture.checked)

    return finish


def needs_step(image: JobImage) -> bool:
    """Whether an image has not taken its last step."""
    return image.sample is None or not image.sample.trajectory.done


def _encode_new(pipeline: Pipeline, images: Sequence[JobImage]) -> None:
    """Embed the prompts of those jobs that begin with this."""
    new = list(dict.fromkeys(image.job for image in images if image.job.conditioning is None))
    encoded = pipeline.encode([job.request for job in new])
    for job, conditioning in zip(new, encoded, strict=True):
        job.conditioning = conditioning
        job.ended("encode")


def _sample_of(pipeline: Pipeline, image: JobImage) -> Sample:
    """An image's sample; at its first use the noise is drawn."""
    if image.sample is None:
        assert image.job.conditioning is not None
        image.sample = pipeline.start(image.job.request, image.index, image.job.conditioning)
    return image.sample


def merge_cost(pipeline: Pipeline, images: Sequence[JobImage]) -> float:
    """Of adding their LoRAs to the weights that they need, unless that was done and kept.

    Those are the UNet's, and for images whose prompts are yet to be embedded the text encoders'.
    Reading and writing all of the UNet's in float32 takes about what two images of the model's own
    size take for a step: 10 to 50 ms for SDXL's, by their bytes, on an H100.
    """
    width, height = pipeline.card.default_size
    has_new = any(image.job.conditioning is None for image in images)
    parts = MODEL_PARTS if has_new else ("unet",)
    share = pipeline.weight_sets.to_merge(parts, images[0].job.request.loras)
    return share * 2.0 * width * height


STEP = Kind(
    "step",
    is_needed_by=needs_step,
    run=run_step,
    cost=lambda lane: lane.pixels * (2.0 if lane.guided else 1.0),
    max_batch=4,
    ready_cost=merge_cost,
)
DECODE = Kind(
    "decode",
    is_needed_by=lambda image: not image.is_decoded,
    run=run_decode,
    # A VAE decode costs about 1.5 UNet evaluations: 10.5 against 6.8 TFLOP for SDXL at 1024x1024.
    cost=lambda lane: lane.pixels * 1.5,
    max_batch=1,
    goes_first=True,
)
KINDS = (STEP, DECODE)
