"""How large the images are: what a caller may ask for, and what a model allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmd2.errors import InvalidRequestError
from dmd2.model_card import ModelCard
from dmd2.request.input_rules import check_choice, integer

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
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 2048, 8
MAX_PIXELS = 4_000_000


@dataclass(frozen=True)
class SizeInputs:
    """What a caller says of the size.

    Attributes:
        aspect_ratio: a key of ASPECT_RATIOS, at the model's own number of pixels.
        width, height: pixels, both or neither; they override aspect_ratio. Multiples of 8 from 64
            to 2048, not under a quarter of the model's own, at most 4,000,000 pixels together.

    Raises:
        InvalidRequestError: aspect_ratio is unknown, or one of width and height is missing.
    """

    aspect_ratio: str = "1:1"
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        check_choice("aspect_ratio", self.aspect_ratio, tuple(ASPECT_RATIOS))
        if (self.width is None) == (self.height is None):
            return
        given, missing = ("width", "height") if self.height is None else ("height", "width")
        raise InvalidRequestError(
            given,
            getattr(self, given),
            f"width and height go together, and {missing} is missing",
            f"Give {missing} too, or leave both out and use aspect_ratio",
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and has no effect."""
        if self.width is None or self.aspect_ratio == "1:1":
            return ()
        return (f"aspect_ratio {self.aspect_ratio} gives way to width and height",)

    def settled(self, model: ModelCard) -> tuple[int, int]:
        """(width, height): as given, or the aspect ratio's at the model's own scale.

        Raises:
            InvalidRequestError: a side is no multiple of 8 from 64 to 2048, or under a quarter of
                the model's own, or both have more than 4,000,000 pixels together.
        """
        width, height = self.width, self.height
        if width is None or height is None:
            scale = math.sqrt(math.prod(model.default_size)) / 1024
            width, height = (_nearest_side(s * scale) for s in ASPECT_RATIOS[self.aspect_ratio])
        width = _side("width", width, model.default_size[0])
        height = _side("height", height, model.default_size[1])
        if width * height > MAX_PIXELS:
            raise InvalidRequestError(
                "width, height",
                (width, height),
                f"together they may have at most {MAX_PIXELS:,} pixels",
                f"At width {width} use a height of at most "
                f"{MAX_PIXELS // width // SIDE_MULTIPLE * SIDE_MULTIPLE}",
            )
        return width, height


def _side(field: str, value: object, own: int) -> int:
    """A side of the image as an int, where the model's own is so long."""
    quarter = math.ceil(own / 4 / SIDE_MULTIPLE) * SIDE_MULTIPLE
    side = integer(field, value, max(MIN_SIDE, quarter), MAX_SIDE)
    if side % SIDE_MULTIPLE:
        below = side // SIDE_MULTIPLE * SIDE_MULTIPLE
        raise InvalidRequestError(
            field,
            side,
            f"it must be a multiple of {SIDE_MULTIPLE}",
            f"Use {below} or {below + SIDE_MULTIPLE}",
        )
    return side


def _nearest_side(pixels: float) -> int:
    return max(MIN_SIDE, round(pixels / SIDE_MULTIPLE) * SIDE_MULTIPLE)
