"""Files: formats, quality, the parameters inside, and the mark of generated media."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dmd2 import __version__
from dmd2.engine import image_io
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest

CARD = ModelCard("tiny", {4: (999, 749, 499, 249)}, (64, 64))
PROMPT = "a café, 星 🐱\nsecond line"
FORMATS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
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


def stored_xmp(data: bytes) -> bytes:
    """The XMP packet as an ordinary reader finds it."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        packet = image.info["xmp"]
    assert isinstance(packet, bytes)
    return packet


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk, every checksum and the end of the file checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        assert int.from_bytes(data[end : end + 4]) == zlib.crc32(data[at + 4 : end])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : end]))
        at = end + 4
    assert at == len(data)
    return chunks


def unfiltered(scanlines: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """PNG's scanlines of RGB pixels, all of the Up filter, decoded by the standard's own words."""
    lines = np.frombuffer(scanlines, np.uint8).reshape(height, 1 + 3 * width)
    assert np.all(lines[:, 0] == 2)
    return np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8).reshape(height, width, 3)


def picture(content: str, height: int, width: int) -> NDArray[np.uint8]:
    """Uint8 [H, W, 3] of one of the kinds that compress very differently."""
    rng = np.random.default_rng(height * width)
    shape = (height, width, 3)
    y, x = np.mgrid[:height, :width]
    make: dict[str, Callable[[], NDArray[np.int64]]] = {
        "noise": lambda: rng.integers(0, 256, shape),
        "flat": lambda: np.full(shape, (3, 200, 255)),
        "gradient": lambda: np.stack([x, 3 * y, x + 2 * y], axis=-1),
        "walk": lambda: np.cumsum(rng.integers(-3, 4, shape), axis=0),
        "half noise": lambda: np.where(x[..., None] < width // 2, 7, rng.integers(0, 256, shape)),
    }
    return make[content]().astype(np.uint8)  # modulo 256


def image_io_without(package: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of image_io, loaded where a package cannot be imported."""
    monkeypatch.setitem(sys.modules, package, None)
    spec = importlib.util.find_spec("dmd2.engine.image_io")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "pillow"), FORMATS)
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
def test_parameters_can_be_left_out(name: str) -> None:
    asked = request(name, embed=False)
    data = image_io.encode(PIXELS, asked, 0)
    assert stored_text(data) is None
    assert data == image_io.encode(PIXELS, replace(asked, prompt="another", seed=7), 1)


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_every_file_says_that_a_trained_model_made_it(name: str, embed: bool) -> None:
    packet = stored_xmp(image_io.encode(PIXELS, request(name, embed=embed), 0))
    (rdf,) = ElementTree.fromstring(packet)
    (description,) = rdf
    about, iptc = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}about", "http://iptc.org/std"
    assert description.attrib == {about: ""}
    assert {said.tag: said.text for said in description} == {
        f"{{{iptc}/Iptc4xmpExt/2008-02-29/}}DigitalSourceType": (
            "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
        )
    }


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_the_mark_is_the_same_whatever_was_asked_for(name: str, embed: bool) -> None:
    asked = request(name, embed=embed)
    other = replace(asked, prompt="</x:xmpmeta><?xpacket end='w'?>", negative_prompt="", seed=7)
    files = [image_io.encode(PIXELS, asked, 0), image_io.encode(PIXELS[::-1], other, 1)]
    assert len({stored_xmp(data) for data in files}) == 1
    assert [data.count(b"trainedAlgorithmicMedia") for data in files] == [1, 1]


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize(("name", "pillow"), FORMATS)
def test_what_a_file_says_changes_no_pixel(name: str, pillow: str, embed: bool) -> None:
    bare, data = io.BytesIO(), image_io.encode(PIXELS, request(name, embed=embed), 0)
    Image.fromarray(PIXELS).save(bare, pillow, quality=90, method=0)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(bare)))


@pytest.mark.parametrize("content", ["noise", "flat", "gradient", "walk", "half noise"])
@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (1, 1), (72, 2048), (2048, 72), (520, 648)]
)
def test_png_keeps_every_pixel(content: str, height: int, width: int) -> None:
    pixels = picture(content, height, width)
    data = image_io.encode(pixels, request("png"), 0)
    assert data == image_io.encode(pixels.copy(), request("png"), 0)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), pixels)
    scanlines = b"".join(content for kind, content in png_chunks(data) if kind == b"IDAT")
    inflate = zlib.decompressobj()
    assert np.array_equal(unfiltered(inflate.decompress(scanlines), height, width), pixels)
    assert inflate.eof
    assert inflate.unused_data == b""


def test_png_takes_pixels_of_any_memory_layout() -> None:
    wide = picture("noise", 64, 192)
    for view in (wide[::2, 5:69], wide.transpose(1, 0, 2), wide[:, :, ::-1]):
        data = image_io.encode(view, request("png"), 0)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), view)


@pytest.mark.parametrize(("prompt", "kind"), [("a café", b"tEXt"), ("星 🐱", b"iTXt")])
def test_png_chunks_are_the_standards(prompt: str, kind: bytes) -> None:
    asked = replace(request("png"), prompt=prompt)
    data = image_io.encode(PIXELS, asked, 0)
    chunks = png_chunks(data)
    assert [name for name, _ in chunks] == [b"IHDR", kind, b"iTXt", b"IDAT", b"IEND"]
    assert chunks[0][1] == bytes([0, 0, 0, 64, 0, 0, 0, 96, 8, 2, 0, 0, 0])
    assert chunks[1][1].startswith(b"parameters\0")
    assert chunks[2][1].startswith(b"XML:com.adobe.xmp\0\0\0\0\0<?xpacket begin=")  # uncompressed
    assert chunks[2][1].endswith(b'<?xpacket end="r"?>')
    assert stored_text(data) == image_io.parameters_text(asked, 0)
    files = replace(asked.files, embed_metadata=False)
    without = image_io.encode(PIXELS, replace(asked, files=files), 0)
    assert png_chunks(without) == [chunks[0], *chunks[2:]]


@pytest.mark.parametrize("size", [64, 2048])
def test_a_png_that_cannot_shrink_stays_within_what_libpng_reads(size: int) -> None:
    data = image_io.encode(picture("noise", size, size), request("png"), 0)
    pixels = dict(png_chunks(data))[b"IDAT"]
    # libpng refuses a longer IDAT (png_check_chunk_length: deflate's own overhead, a block a row).
    assert len(pixels) <= size * (1 + 3 * size) + 6 + 5 * (size + 1)


def test_threads_encode_as_one_does() -> None:
    """To the same pixels; isal may compress otherwise in another thread (docs/performance.md)."""
    pictures = [picture("walk", 256, 8 * width) for width in range(16, 48)]
    with ThreadPoolExecutor(4) as threads:
        together = threads.map(lambda pixels: image_io.encode(pixels, request("png"), 0), pictures)
    for pixels, data in zip(pictures, together, strict=True):
        kinds = [kind for kind, _ in png_chunks(data)]
        assert kinds == [b"IHDR", b"iTXt", b"iTXt", b"IDAT", b"IEND"]
        assert stored_text(data) == image_io.parameters_text(request("png"), 0)
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_without_isal_pillow_writes_the_same_image_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain = image_io_without("isal", monkeypatch)
        files = [plain.encode(PIXELS, request("png", embed=embed), 1) for embed in (True, False)]
    (record,) = caplog.records
    assert record.name == "dmd2.engine.image_io"
    assert "pip install isal" in record.message
    for data in files:
        png_chunks(data)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), PIXELS)
        assert stored_xmp(data) == stored_xmp(image_io.encode(PIXELS, request("png"), 1))
    expected = image_io.parameters_text(request("png"), 1)
    assert [stored_text(data) for data in files] == [expected, None]


def test_with_isal_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast = image_io_without("no_such_package", monkeypatch)
    data = fast.encode(PIXELS, request("png"), 0)
    assert data == image_io.encode(PIXELS, request("png"), 0)
    assert caplog.records == []


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
