"""GenerationRequest: what is to be made, with every rule checked before anything is run."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from dmd2.errors import InvalidRequestError
from dmd2.model_card import ModelCard
from dmd2.request.input_rules import (
    check_choice,
    check_text,
    has_visible_character,
    integer,
    number,
)

# SDXL's own training sizes of about one megapixel, (width, height): SDXL report, appendix I.
ASPECT_RATIOS: dict[str, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "4:3": (1152, 896),
    "3:4": (896, 1152),
    "4:5": (896, 1088),
    "5:4": (1088, 896),
    "21:9": (1536, 640),
    "9:21": (640, 1536),
}
OUTPUT_FORMATS = ("png", "jpg", "webp")
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 2048, 8
MAX_PIXELS = 4_000_000
MAX_OUTPUTS = 4
MAX_GUIDANCE_SCALE = 10.0
MAX_SEED = 2**32 - 1
MAX_QUALITY = 100


@dataclass(frozen=True)
class GenerationRequest:
    """A request whose every field is settled and allowed for its model.

    Attributes:
        model: the card of the model that will run it.
        prompt: 1 to 4000 characters, not blank.
        negative_prompt: at most 4000 characters; only with guidance_scale above 1. Empty means
            none, which stock diffusers encodes as zeros for SDXL.
        width, height: pixels, multiples of 8, 64 to 2048, at least a quarter of the model's own
            size, at most 4,000,000 pixels together.
        num_outputs: images, 1 to 4.
        num_inference_steps: a step count of the model's card.
        guidance_scale: 0 to 10; classifier-free guidance acts above 1.
        seed: 0 to 2**32 - 1; image i is made from seed + i, which stays in that range too.
        output_format: "png", "jpg" or "webp".
        output_quality: 0 to 100, for jpg and webp.
        embed_metadata: whether the files carry their parameters.
        fast_decode: whether the model's fast decoder makes the pixels, nearly the VAE's.
        disable_safety_checker: whether the images are returned unclassified.
        notes: for the logs, what was asked for and has no effect here.

    Raises:
        InvalidRequestError: a field breaks its rule.
    """

    model: ModelCard
    prompt: str
    width: int
    height: int
    num_inference_steps: int
    seed: int
    negative_prompt: str = ""
    num_outputs: int = 1
    guidance_scale: float = 0.0
    output_format: str = "png"
    output_quality: int = 90
    embed_metadata: bool = True
    fast_decode: bool = False
    disable_safety_checker: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls,
        model: ModelCard,
        *,
        prompt: str,
        negative_prompt: str = "",
        aspect_ratio: str = "1:1",
        width: int | None = None,
        height: int | None = None,
        num_outputs: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 0.0,
        seed: int | None = None,
        output_format: str = "png",
        output_quality: int = 90,
        embed_metadata: bool = True,
        fast_decode: bool = False,
        disable_safety_checker: bool = False,
    ) -> GenerationRequest:
        """The request that a caller's inputs mean, with the model's defaults filled in.

        An omitted seed is drawn from the operating system, from all 32-bit seeds that leave
        room for one per image.
        """
        num_outputs = integer("num_outputs", num_outputs, 1, MAX_OUTPUTS)
        settled_width, settled_height = _size(model, aspect_ratio, width, height)
        notes = []
        if width is not None and aspect_ratio != "1:1":
            notes.append(f"aspect_ratio {aspect_ratio} gives way to width and height")
        guidance_scale = number("guidance_scale", guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        if 0 < guidance_scale <= 1:
            notes.append(f"guidance_scale {guidance_scale:g} does nothing: it acts above 1")
        if output_format == "png" and output_quality != 90:
            notes.append("output_quality does nothing for png, which is lossless")
        if disable_safety_checker and not model.checks_safety:
            notes.append("disable_safety_checker does nothing: no safety checker is at work")
        return cls(
            model=model,
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=settled_width,
            height=settled_height,
            num_outputs=num_outputs,
            num_inference_steps=(
                model.default_steps if num_inference_steps is None else num_inference_steps
            ),
            guidance_scale=guidance_scale,
            seed=secrets.randbelow(MAX_SEED - num_outputs + 2) if seed is None else seed,
            output_format=output_format,
            output_quality=output_quality,
            embed_metadata=embed_metadata,
            fast_decode=fast_decode,
            disable_safety_checker=disable_safety_checker,
            notes=tuple(notes),
        )

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if not has_visible_character(self.prompt):
            raise InvalidRequestError(
                "prompt", self.prompt, "it must hold a visible character", "Describe the image"
            )
        self._settle("num_outputs", integer, 1, MAX_OUTPUTS)
        self._settle("output_quality", integer, 0, MAX_QUALITY)
        self._settle("guidance_scale", number, 0.0, MAX_GUIDANCE_SCALE)
        self._settle("seed", integer, 0, MAX_SEED)
        self._check_negative_prompt()
        self._check_size()
        self._check_steps()
        self._check_last_seed()
        self._check_fast_decode()
        check_choice("output_format", self.output_format, OUTPUT_FORMATS)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps that every image of this request is sampled at."""
        return self.model.timesteps[self.num_inference_steps]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [self.seed + index for index in range(self.num_outputs)]

    @property
    def uses_guidance(self) -> bool:
        """Whether classifier-free guidance acts; it doubles the UNet's cost."""
        return self.guidance_scale > 1

    def _settle(self, field: str, check: Callable[..., object], low: object, high: object) -> None:
        object.__setattr__(self, field, check(field, getattr(self, field), low, high))

    def _check_negative_prompt(self) -> None:
        check_text("negative_prompt", self.negative_prompt)
        if self.negative_prompt and not self.uses_guidance:
            raise InvalidRequestError(
                "negative_prompt",
                self.negative_prompt,
                f"it acts only with guidance_scale above 1, which is {self.guidance_scale:g}",
                "Leave negative_prompt out, or raise guidance_scale (at twice the cost)",
            )

    def _check_size(self) -> None:
        for index, field in enumerate(("width", "height")):
            quarter = math.ceil(self.model.default_size[index] / 4 / SIDE_MULTIPLE) * SIDE_MULTIPLE
            low = max(MIN_SIDE, quarter)
            self._settle(field, integer, low, MAX_SIDE)
            side = getattr(self, field)
            if side % SIDE_MULTIPLE:
                below = side // SIDE_MULTIPLE * SIDE_MULTIPLE
                raise InvalidRequestError(
                    field,
                    side,
                    f"it must be a multiple of {SIDE_MULTIPLE}",
                    f"Use {below} or {below + SIDE_MULTIPLE}",
                )
        if self.width * self.height > MAX_PIXELS:
            raise InvalidRequestError(
                "width, height",
                (self.width, self.height),
                f"together they may have at most {MAX_PIXELS:,} pixels",
                f"At width {self.width} use a height of at most "
                f"{MAX_PIXELS // self.width // SIDE_MULTIPLE * SIDE_MULTIPLE}",
            )

    def _check_steps(self) -> None:
        allowed = sorted(self.model.timesteps)
        listed = ", ".join(f"{n} (at {list(self.model.timesteps[n])})" for n in allowed)
        field = "num_inference_steps"
        try:
            self._settle(field, integer, allowed[0], allowed[-1])
            known = self.num_inference_steps in self.model.timesteps
        except InvalidRequestError:
            known = False
        if not known:
            raise InvalidRequestError(
                field,
                self.num_inference_steps,
                f"{self.model.name} was distilled for {listed} only",
                f"Leave it out, or use {' or '.join(map(str, allowed))}",
            )

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


def _size(
    model: ModelCard, aspect_ratio: str, width: int | None, height: int | None
) -> tuple[int, int]:
    """(width, height): as given, or the aspect ratio's at the model's own scale."""
    check_choice("aspect_ratio", aspect_ratio, tuple(ASPECT_RATIOS))
    if width is not None and height is not None:
        return width, height
    if width is not None or height is not None:
        missing, given = ("height", width) if height is None else ("width", height)
        raise InvalidRequestError(
            "width" if height is None else "height",
            given,
            f"width and height go together, and {missing} is missing",
            f"Give {missing} too, or leave both out and use aspect_ratio",
        )
    scale = math.sqrt(math.prod(model.default_size)) / 1024
    across, down = ASPECT_RATIOS[aspect_ratio]
    return _nearest_side(across * scale), _nearest_side(down * scale)


def _nearest_side(pixels: float) -> int:
    return max(MIN_SIDE, round(pixels / SIDE_MULTIPLE) * SIDE_MULTIPLE)
