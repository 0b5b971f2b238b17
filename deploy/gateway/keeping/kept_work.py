"""Work as the journal keeps it: all that makes the same pixels again, and nothing secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from deploy.gateway.work import Work
from dmd2.errors import DMD2Error
from dmd2.loras.sources import without_secrets
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest, input_names
from dmd2.request.lora_rules import FIELDS, LoraInputs

REDACTED = "[REDACTED]"
# Those that no message may show.
TOKENS = tuple(each.name for each in fields(LoraInputs) if not each.repr)


class WorkLostError(DMD2Error):
    """What was accepted cannot be done by this gateway as it was by the one that accepted it."""


@dataclass(frozen=True)
class KeptWork:
    """Work without what must not be written down.

    Attributes:
        model: the name of the model that it was accepted for.
        inputs: every input of the request, settled, by its name; the seed too.
        loras: those inputs that say where LoRAs are, without tokens.
        is_secret_lost: whether it needed a token, or a URL that may hold one.
    """

    model: str
    inputs: Mapping[str, Any]
    loras: Mapping[str, Any] = field(default_factory=dict)
    is_secret_lost: bool = False

    @classmethod
    def of(cls, work: Work) -> KeptWork:
        """What may be kept of work."""
        said = asdict(work.loras)
        tokens = [said.pop(name) for name in TOKENS]
        loras = {name: value for name, value in said.items() if value not in (None, "")}
        shown = without_urls_secrets(loras)
        return cls(
            model=work.request.model.name,
            inputs=_inputs_of(work.request),
            loras=shown,
            is_secret_lost=bool(work.loras.wanted) and (any(tokens) or shown != loras),
        )

    def check(self) -> None:
        """Raise WorkLostError where a secret that it needs is not there any more."""
        if self.is_secret_lost:
            raise WorkLostError(
                "the gateway was started again before this was done, and keeps no token and no URL "
                "that may hold one, which its LoRA needs; send it again"
            )

    def restored(self, id: str, card: ModelCard) -> Work:
        """The work.

        Args:
            id: of its prediction.
            card: of the model that the engines have now.

        Raises:
            WorkLostError: that is another model, or a secret is lost.
            InvalidRequestError: this model, as it is installed now, cannot do it.
        """
        self.check()
        if card.name != self.model:
            raise WorkLostError(
                f"it was accepted for the model {self.model}, and the gateway was started again "
                f"with {card.name}; send it again, or start that model"
            )
        return Work(id, GenerationRequest.resolve(card, **self.inputs), LoraInputs(**self.loras))


def shown_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's inputs without tokens, and without what may be secret in a LoRA's URL."""
    tokens = {name: REDACTED for name in TOKENS if inputs.get(name)}
    return without_urls_secrets({**inputs, **tokens})


def without_urls_secrets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs whose LoRAs' URLs have no user, query and fragment."""
    urls = {name: inputs[name] for name in FIELDS if isinstance(inputs.get(name), str)}
    return {**inputs, **{name: without_secrets(url) for name, url in urls.items()}}


def _inputs_of(request: GenerationRequest) -> dict[str, Any]:
    """The inputs that resolve to a request, by their names."""
    flat: dict[str, Any] = {}
    for each in fields(request):
        if each.init and each.name != "model":
            value: Any = getattr(request, each.name)
            is_group = is_dataclass(value) and not isinstance(value, type)
            flat |= asdict(value) if is_group else {each.name: value}
    return {name: flat[name] for name in sorted(input_names()) if flat[name] is not None}
