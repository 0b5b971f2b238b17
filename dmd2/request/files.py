"""How the images are written."""

from __future__ import annotations

from dataclasses import dataclass

from dmd2.request.input_rules import check_choice, integer, settle

OUTPUT_FORMATS = ("png", "jpg", "webp")
MAX_QUALITY = 100
DEFAULT_QUALITY = 90


@dataclass(frozen=True)
class FileInputs:
    """How the images are written.

    Attributes:
        output_format: "png", "jpg" or "webp".
        output_quality: 0 to 100, for jpg and webp.
        embed_metadata: whether the files carry their parameters; that a trained model made them
            they say in any case.

    Raises:
        InvalidRequestError: one of them breaks its rule.
    """

    output_format: str = "png"
    output_quality: int = DEFAULT_QUALITY
    embed_metadata: bool = True

    def __post_init__(self) -> None:
        check_choice("output_format", self.output_format, OUTPUT_FORMATS)
        settle(self, "output_quality", integer, 0, MAX_QUALITY)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was asked for and has no effect."""
        if self.output_format != "png" or self.output_quality == DEFAULT_QUALITY:
            return ()
        return ("output_quality does nothing for png, which is lossless",)
