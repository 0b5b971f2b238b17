"""What the caller of a request is told beside its images, and what the server's log is."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dmd2.engine.job import GenerationResult
from dmd2.errors import InvalidRequestError, UnsafeContentError
from dmd2.request.generation_request import GenerationRequest
from dmd2.request.lora_rules import LoraInputs


@dataclass(frozen=True)
class Report:
    """What the caller is told at one point of a request's way.

    Attributes:
        lines: of the request's log, without their newlines.
        metrics: by name, in the order in which they are told.
    """

    lines: list[str]
    metrics: dict[str, Any]


def of_start(request: GenerationRequest, loras: LoraInputs) -> Report:
    """What is known before anything is run."""
    return Report(
        [
            f"{request.model.name}: seed {request.seed}, {request.width}x{request.height}",
            *(f"note: {note}" for note in (*request.notes, *loras.notes)),
        ],
        {
            "model": request.model.name,
            "seeds": request.seeds,
            "width": request.width,
            "height": request.height,
            "steps": request.num_inference_steps,
        },
    )


def of_end(result: GenerationResult) -> Report:
    """What is known once all of it is done."""
    metrics: dict[str, Any] = {
        "seconds": {stage: round(seconds, 4) for stage, seconds in result.seconds.items()},
        "batch_sizes": result.batch_sizes,
        "ways": result.ways,
    }
    if loras := result.request.loras:
        metrics["loras"] = [{"name": x.name, "sha256": x.sha256, "scale": x.scale} for x in loras]
    metrics["images"] = len(result.paths)
    if result.unread:
        metrics["unread"] = result.unread
    if any(score is not None for score in result.nsfw_scores) or result.flagged:
        metrics["nsfw_scores"] = result.nsfw_scores
        metrics["flagged"] = result.flagged
        metrics["withheld"] = result.withheld
    return Report([f"note: {note}" for note in result.notes], metrics)


def summary_of(result: GenerationResult, with_prompt: bool) -> str:
    """The server's own line on a request that was answered."""
    request, seconds = result.request, sum(result.seconds.values())
    prompt = f": {request.prompt!r}" if with_prompt else ""
    return (
        f"{len(result.paths)} images of {request.width}x{request.height} from seed {request.seed} "
        f"in {seconds:.3f} s{prompt}"
    )


@contextmanager
def reporting_failures(log: logging.Logger) -> Iterator[None]:
    """Log what no caller is to blame for, and let every error pass on, worded for the caller."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, InvalidRequestError | UnsafeContentError):
            log.exception("a prediction failed")
        error.args = (_without_trigger(str(error)),)
        raise


def _without_trigger(message: str) -> str:
    """The message in a spelling that coglet does not take for the caller's cancellation."""
    return re.sub("cancelled", "canceled", message, flags=re.IGNORECASE)
