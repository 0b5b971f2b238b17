"""Which LoRAs a request asks for, and what is known of each once its file is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from dmd2.errors import GenerationError, InvalidRequestError
from dmd2.request.input_rules import number

MIN_LORA_SCALE, MAX_LORA_SCALE = -1.0, 3.0
# Of a set of LoRAs, each one's content and scale: all that decides what the set does.
LoraKey = tuple[tuple[str, float], ...]
# Each LoRA's input, and that of its scale.
FIELDS = {"lora_weights": "lora_scale", "extra_lora": "extra_lora_scale"}


@dataclass(frozen=True)
class LoraUse:
    """A LoRA whose file was fetched, read and found to fit the model.

    Attributes:
        name: what logs, metrics and files call it: its file's name without the suffix.
        sha256: of the file, in hexadecimal.
        scale: -1 to 3.
        deltas: per model part and parameter what is added to it, as dmd2.loras.formats reads it.
    """

    name: str
    sha256: str
    scale: float
    deltas: Mapping[str, Mapping[str, Any]] = field(compare=False, repr=False)


def key_of(loras: Sequence[LoraUse]) -> LoraKey:
    """What tells sets of LoRAs apart."""
    return tuple((lora.sha256, lora.scale) for lora in loras)


def shown_of(loras: Sequence[LoraUse]) -> str:
    """What messages call them."""
    return " and ".join(f"{lora.name} at {lora.scale:g}" for lora in loras)


@contextmanager
def suspecting(loras: Sequence[LoraUse]) -> Iterator[None]:
    """Let the error of an image that came out broken name its LoRAs, which may be too strong."""
    try:
        yield
    except GenerationError as error:
        if not loras:
            raise
        scales = " or ".join([*FIELDS.values()][: len(loras)])
        raise GenerationError(
            f"{error}, with {shown_of(loras)} added to the weights. Lower {scales}, or use another "
            "LoRA"
        ) from error


@dataclass(frozen=True)
class LoraInputs:
    """What a caller says of LoRAs; it holds tokens, and so goes no further than their fetching.

    Attributes:
        lora_weights: where the first one is; "" for none.
        lora_scale: its strength, -1 to 3; None means 1.
        extra_lora, extra_lora_scale: a second one, beside the first.
        hf_api_token, civitai_api_token: for files that need one; "" for none.

    Raises:
        InvalidRequestError: one of them breaks its rule.
    """

    lora_weights: str = ""
    lora_scale: float | None = None
    extra_lora: str = ""
    extra_lora_scale: float | None = None
    hf_api_token: str = field(default="", repr=False)
    civitai_api_token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for weights, scale in FIELDS.items():
            _check_reference(weights, getattr(self, weights))
            self._check_scale(weights, scale)
        if self.extra_lora and not self.lora_weights:
            raise InvalidRequestError(
                "extra_lora",
                "(a LoRA)",
                "it is a second LoRA, and lora_weights has no first",
                "Give it as lora_weights",
            )

    @classmethod
    def taken_from(cls, inputs: dict[str, Any]) -> LoraInputs:
        """Those of a caller's inputs that are of LoRAs, which are taken out; None is left out."""
        names = [each.name for each in fields(cls)]
        given = {name: inputs.pop(name) for name in names if name in inputs}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def wanted(self) -> dict[str, tuple[str, float]]:
        """For each input that names a LoRA, what it says and the scale; in the order of merging."""
        return {
            weights: (getattr(self, weights), _or_one(getattr(self, scale)))
            for weights, scale in FIELDS.items()
            if getattr(self, weights)
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and has no effect."""
        tokens = [name for name in ("hf_api_token", "civitai_api_token") if getattr(self, name)]
        return tuple(
            [
                f"{FIELDS[name]} 0 leaves nothing of {name}"
                for name, (_, scale) in self.wanted.items()
                if scale == 0
            ]
            + [f"{name} does nothing: no LoRA is asked for" for name in tokens if not self.wanted]
        )

    def _check_scale(self, weights: str, scale: str) -> None:
        value = getattr(self, scale)
        if value is None:
            return
        if not getattr(self, weights):
            raise InvalidRequestError(
                scale, value, f"it is the strength of {weights}, which is empty", "Leave it out"
            )
        settled = float(number(scale, value, MIN_LORA_SCALE, MAX_LORA_SCALE))
        object.__setattr__(self, scale, settled)


def _check_reference(field: str, value: object) -> None:
    """Refuse what is no text; the error does not show it, since a URL may hold a key."""
    if not isinstance(value, str):
        raise InvalidRequestError(field, value, "it must be text", "Send a string")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        shown = f"a text of {len(value)} characters"
        limit = "it holds a NUL or half of a surrogate pair"
        raise InvalidRequestError(field, shown, limit, "Remove that character")


def _or_one(scale: float | None) -> float:
    return 1.0 if scale is None else scale
