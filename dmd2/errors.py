"""Every error that this package raises on purpose.

DMD2Error
├── InvalidRequestError   an input that breaks a rule; never reaches the GPU (also a ValueError)
├── ModelError            a model folder that cannot be used as it is
│   └── MissingWeightsError   the model's weights are not installed
├── LoraError             a LoRA file that cannot be used
│   └── MergeError            at its scale it is too much for the weights
├── DownloadError         weights that could not be fetched, verified or installed
│   └── ReadOnlyWeightsError  where they belong nothing can be written
└── GenerationError       the engine could not finish a valid request
    ├── DeviceMemoryError     it needs more memory than the device has left
    ├── DeadlineError         it waited or ran longer than it may
    └── UnsafeContentError    the safety checker withheld every image
"""

from __future__ import annotations

PRIVATE_FIELDS = ("prompt", "negative_prompt")


class DMD2Error(Exception):
    """The root of the tree above."""


class InvalidRequestError(DMD2Error, ValueError):
    """An input breaks a rule.

    Attributes:
        field: the input's name, as the caller wrote it.
        value: what was given.
        limit: the rule, as a sentence without its full stop.
        remedy: the way out, as a sentence without its full stop.
    """

    def __init__(self, field: str, value: object, limit: str, remedy: str) -> None:
        self.field, self.value, self.limit, self.remedy = field, value, limit, remedy
        super().__init__(f"{field}: {_shown(field, value)} is not allowed: {limit}. {remedy}.")


class ModelError(DMD2Error):
    """A model folder is incomplete, or is not a model that this engine can run."""


class MissingWeightsError(ModelError):
    """The model is known, and its weights are not installed."""


class LoraError(DMD2Error):
    """A LoRA file is not one that can be added to the model, by its content.

    Attributes:
        limit: what is wrong with it, as a sentence without its full stop.
        remedy: the way out, as a sentence without its full stop.
    """

    def __init__(self, limit: str, remedy: str) -> None:
        self.limit, self.remedy = limit, remedy
        super().__init__(f"{limit}. {remedy}.")

    def of_field(self, field: str, value: object) -> InvalidRequestError:
        """The same, said of the input that named the file."""
        return InvalidRequestError(field, value, self.limit, self.remedy)


class MergeError(LoraError):
    """Weights with LoRAs added are more than their dtype can hold.

    Attributes:
        place: among the LoRAs, of the one that adds most there.
    """

    def __init__(self, limit: str, remedy: str, place: int) -> None:
        super().__init__(limit, remedy)
        self.place = place


class DownloadError(DMD2Error):
    """Weights could not be fetched, verified or installed; nothing half-done was installed."""


class ReadOnlyWeightsError(DownloadError):
    """Weights are missing, and nothing can be written where they belong."""


class GenerationError(DMD2Error):
    """A valid request could not be finished."""


class DeviceMemoryError(GenerationError):
    """A unit of work needs more memory than the device has left; the models are as they were."""


class DeadlineError(GenerationError):
    """A request waited in the queue, or ran, longer than the server allows; it was given up."""


class UnsafeContentError(GenerationError):
    """The safety checker flagged every image of a request, so that there is nothing to return."""


def _shown(field: str, value: object) -> str:
    """The value as the message shows it: at most 60 characters, printable in any encoding.

    Of a prompt it shows the length alone: Cog's server logs every error.
    """
    if field in PRIVATE_FIELDS and isinstance(value, str):
        return f"a text of {len(value)} characters"
    text = ascii(value) if _has_surrogate(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:56]}... ({len(text)} characters)"


def _has_surrogate(value: object) -> bool:
    return isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)
