"""GenerationRequest: what is to be made, with every rule checked before anything is run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from dmd2.errors import InvalidRequestError
from dmd2.model_card import ModelCard
from dmd2.request.files import FileInputs
from dmd2.request.input_rules import check_text, has_visible_character, integer, number, settle
from dmd2.request.lora_rules import LoraUse
from dmd2.request.size import SizeInputs

MAX_OUTPUTS = 4
MAX_GUIDANCE_SCALE = 10.0
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class GenerationRequest:
    """A request whose every field is settled and allowed for its model.

    All fields but model and loras are inputs: by their own names, or groups of inputs. A group is
    a frozen dataclass with its own rules and notes; the caller gives its fields beside the others.

    Attributes:
        model: the card of the model that will run it.
        prompt: 1 to 4000 characters, not blank.
        num_inference_steps: a step count of the model's card, trained or community practice.
        seed: 0 to 2**32 - 1; image i is made from seed + i, which stays in that range too.
        negative_prompt: at most 4000 characters; only with guidance_scale above 1. Empty means
            none, which stock diffusers encodes as zeros for SDXL.
        num_outputs: images, 1 to 4.
        guidance_scale: 0 to 10; classifier-free guidance acts above 1.
        fast_decode: whether the model's fast decoder makes the pixels, nearly the VAE's.
        disable_safety_checker: whether the images are returned unclassified.
        size: what was asked of the size.
        files: how they are written.
        loras: added to the model's weights, in this order; no input of this class, since a caller
            says where they are, and here they have been fetched.
        width, height: in pixels, what size comes to; no inputs of this class.

    Raises:
        InvalidRequestError: a field breaks its rule.
    """

    model: ModelCard
    prompt: str
    num_inference_steps: int
    seed: int
    negative_prompt: str = ""
    num_outputs: int = 1
    guidance_scale: float = 0.0
    fast_decode: bool = False
    disable_safety_checker: bool = False
    size: SizeInputs = field(default_factory=SizeInputs, compare=False)
    files: FileInputs = field(default_factory=FileInputs)
    loras: tuple[LoraUse, ...] = ()
    width: int = field(init=False)
    height: int = field(init=False)

    @classmethod
    def resolve(cls, model: ModelCard, **inputs: Any) -> GenerationRequest:
        """The request that a caller's inputs mean, with the model's defaults filled in.

        An omitted seed is drawn from the operating system, from all 32-bit seeds that leave
        room for one per image.

        Args:
            model: the card of the model that will run it.
            inputs: by the names of predict.py; None is as good as left out.

        Raises:
            InvalidRequestError: one breaks its rule, is needed and missing, or is unknown.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        known = input_names()
        if unknown := sorted(given.keys() - known):
            remedy = f"Use {', '.join(sorted(known))}"
            raise InvalidRequestError("inputs", unknown[0], "there is no such input", remedy)
        groups = {name: _taken_from(given, group) for name, group in _groups().items()}
        num_outputs = integer("num_outputs", given.get("num_outputs", 1), 1, MAX_OUTPUTS)
        settled_by_the_model = {
            "num_inference_steps": model.default_steps,
            "seed": secrets.randbelow(MAX_SEED - num_outputs + 2),
        }
        return cls(model, **{"prompt": ""} | settled_by_the_model | groups | given)

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if not has_visible_character(self.prompt):
            raise InvalidRequestError(
                "prompt", self.prompt, "it must hold a visible character", "Describe the image"
            )
        settle(self, "num_outputs", integer, 1, MAX_OUTPUTS)
        settle(self, "guidance_scale", number, 0.0, MAX_GUIDANCE_SCALE)
        settle(self, "seed", integer, 0, MAX_SEED)
        for side, pixels in zip(("width", "height"), self.size.settled(self.model), strict=True):
            object.__setattr__(self, side, pixels)
        self._check_negative_prompt()
        self._check_steps()
        self._check_last_seed()
        self._check_fast_decode()

    @property
    def notes(self) -> tuple[str, ...]:
        """For the logs: what was asked for and has no effect here."""
        notes = [note for group in _groups() for note in getattr(self, group).notes]
        if self.num_inference_steps in self.model.community_steps:
            notes.append(
                f"{self.num_inference_steps} steps are community practice: {self.model.name} was "
                "not trained for them"
            )
        if 0 < self.guidance_scale <= 1:
            notes.append(f"guidance_scale {self.guidance_scale:g} does nothing: it acts above 1")
        if self.disable_safety_checker and not self.model.checks_safety:
            notes.append("disable_safety_checker does nothing: no safety checker is at work")
        return tuple(notes)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps that every image of this request is sampled at."""
        return self.model.all_timesteps[self.num_inference_steps]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + index for index in range(self.num_outputs)]

    @property
    def uses_guidance(self) -> bool:
        """Whether classifier-free guidance acts; it doubles the UNet's cost."""
        return self.guidance_scale > 1

    def _check_negative_prompt(self) -> None:
        check_text("negative_prompt", self.negative_prompt)
        if self.negative_prompt and not self.uses_guidance:
            raise InvalidRequestError(
                "negative_prompt",
                self.negative_prompt,
                f"it acts only with guidance_scale above 1, which is {self.guidance_scale:g}",
                "Leave negative_prompt out, or raise guidance_scale (at twice the cost)",
            )

    def _check_steps(self) -> None:
        field, model = "num_inference_steps", self.model
        allowed = sorted(model.all_timesteps)
        try:
            settle(self, field, integer, allowed[0], allowed[-1])
            known = self.num_inference_steps in allowed
        except InvalidRequestError:
            known = False
        if known:
            return
        limit = f"{model.name} was distilled for {_listed(model.timesteps)} only"
        if model.community_steps:
            limit += f"; {_listed(model.community_steps)} is community practice, not trained"
        remedy = f"Leave it out, or use {' or '.join(map(str, allowed))}"
        raise InvalidRequestError(field, self.num_inference_steps, limit, remedy)

    def _check_last_seed(self) -> None:
        if self.seed + self.num_outputs - 1 > MAX_SEED:
            raise InvalidRequestError(
                "seed",
                self.seed,
                f"with num_outputs {self.num_outputs} the last image's seed would pass {MAX_SEED}",
                f"Use a seed of at most {MAX_SEED - self.num_outputs + 1}",
            )

    def _check_fast_decode(self) -> None:
        if not self.fast_decode or self.model.can_decode_fast:
            return
        decoder = self.model.fast_decoder
        if decoder is None:
            limit, remedy = f"{self.model.name} has no fast decoder", "Leave it out"
        else:
            limit = f"{decoder}, which does it, was not installed when the server started"
            remedy = f"Run `scripts/download-weights {decoder}` and start again, or leave it out"
        raise InvalidRequestError("fast_decode", True, limit, remedy)


def input_names() -> set[str]:
    """The names of all inputs, those in groups among them."""
    groups = _groups()
    own = {each.name for each in fields(GenerationRequest) if each.init}
    own -= {"model", "loras", *groups}
    return own.union(*({each.name for each in fields(group)} for group in groups.values()))


def _listed(timesteps: Mapping[int, tuple[int, ...]]) -> str:
    return ", ".join(f"{n} (at {list(timesteps[n])})" for n in sorted(timesteps))


def _groups() -> dict[str, Any]:
    """The class of each group of inputs, by the request's field that it is."""
    made_by = {each.name: each.default_factory for each in fields(GenerationRequest)}
    return {name: made for name, made in made_by.items() if is_dataclass(made)}


def _taken_from(given: dict[str, Any], group: Any) -> Any:
    """A group of inputs, made of those that are given, which are taken out."""
    names = [each.name for each in fields(group)]
    return group(**{name: given.pop(name) for name in names if name in given})
