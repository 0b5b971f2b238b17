"""Files: formats, quality, and the parameters inside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from dmd2 import __version__, image_io
from dmd2.model_card import ModelCard
from dmd2.request import GenerationRequest

CARD = ModelCard("tiny", {4: (999, 749, 499, 249)}, (64, 64))
PROMPT = "a café, 星 🐱\nsecond line"
PIXELS = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)


def request(output_format: str, quality: int = 90, embed: bool = True) -> GenerationRequest:
    return GenerationRequest.resolve(
        CARD,
        prompt=PROMPT,
        negative_prompt="naïve",
        guidance_scale=2.5,
        width=64,
        height=96,
        seed=41,
        num_outputs=2,
        output_format=output_format,
        output_quality=quality,
        embed_metadata=embed,
    )


def stored_text(data: bytes) -> str | None:
    """The parameters as an ordinary reader finds them."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.format == "PNG":
            return image.text.get("parameters")
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return None
    assert comment.startswith(b"UNICODE\0")
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be")


@pytest.mark.parametrize(("name", "pillow"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_every_format_decodes_and_carries_its_parameters(name: str, pillow: str) -> None:
    data = image_io.encode(PIXELS, request(name), 1)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, image.mode) == (pillow, (64, 96), "RGB")
        if name == "png":
            assert np.array_equal(np.asarray(image), PIXELS)
    assert stored_text(data) == (
        f"{PROMPT}\nNegative prompt: naïve\nSteps: 4, Sampler: LCM, CFG scale: 2.5, Seed: 42, "
        f"Size: 64x96, Model: tiny, Version: dmd2-cog {__version__}"
    )


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_the_longest_prompts_fit(name: str) -> None:
    longest = GenerationRequest.resolve(
        CARD,
        prompt="🐱" * 4000,
        negative_prompt="星" * 4000,
        guidance_scale=2,
        output_format=name,
    )
    text = stored_text(image_io.encode(PIXELS, longest, 0))
    assert text is not None
    assert text.startswith("🐱" * 4000 + "\nNegative prompt: " + "星" * 4000)


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_metadata_can_be_left_out(name: str) -> None:
    data = image_io.encode(PIXELS, request(name, embed=False), 0)
    assert stored_text(data) is None
    assert b"Seed" not in data
    assert b"S\0e\0e\0d" not in data


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_quality_counts(name: str) -> None:
    sizes = [len(image_io.encode(PIXELS, request(name, quality), 0)) for quality in (0, 50, 100)]
    assert sizes == sorted(set(sizes))


def test_a_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        image_io.write(tmp_path / "a.png", b"123")
    assert not (tmp_path / "a.png").exists()
