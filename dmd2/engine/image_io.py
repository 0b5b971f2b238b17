"""Pixels to files: PNG, JPEG and WebP that say what made them, and with which parameters."""

from __future__ import annotations

import io
import logging
import struct
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from dmd2 import __version__
from dmd2.request.generation_request import GenerationRequest

log = logging.getLogger(__name__)

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None  # type: ignore[assignment]
    # Here and not in encode: said once, when a server starts, and not in a user's prediction.
    log.warning(
        "isal is not installed: Pillow writes the PNG files, which takes it ten times as long. "
        "Install it with: pip install isal"
    )

# The PNG text key and the text's layout that the common viewers and model sites read.
PNG_TEXT_KEY = "parameters"
_EXIF_UNICODE = b"UNICODE\0"
# What every file says, whoever asks: IPTC's Digital Source Type for media that a trained model made
# (Photo Metadata Standard), as an XMP packet. Read-only ("r"), as XMP's part 3 demands of PNG.
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>"
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType>"
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
).encode()
_PNG_XMP_KEY = "XML:com.adobe.xmp"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_FILTER_UP = 2
# Of a file beside its pixels, prompt and negative prompt.
_MOST_OTHER_BYTES = 4096


def parameters_text(request: GenerationRequest, index: int) -> str:
    """The parameters of image index, in the layout that Stable Diffusion tools share.

    The prompt, then the negative prompt where there is one, then one line of "name: value"
    pairs that is enough to make the image again, alone.
    """
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    pairs = {
        "Steps": request.num_inference_steps,
        "Sampler": "LCM",
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": request.seeds[index],
        "Size": f"{request.width}x{request.height}",
        "Model": request.model.name,
        **_lora_pairs(request),
        "Version": f"dmd2-cog {__version__}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def _lora_pairs(request: GenerationRequest) -> dict[str, str]:
    """Each LoRA's hash, by which model sites know its file, and its scale."""
    if not request.loras:
        return {}
    hashes = ", ".join(f"{lora.name}: {lora.sha256[:10]}" for lora in request.loras)
    scales = ", ".join(f"{lora.name}: {lora.scale:g}" for lora in request.loras)
    return {"Lora hashes": f'"{hashes}"', "Lora scales": f'"{scales}"'}


def encode(pixels: NDArray[np.uint8], request: GenerationRequest, index: int) -> bytes:
    """Image index of a request, uint8 [H, W, 3], as the bytes of its file.

    Its parameters are inside if the request says so, the XMP mark of generated media always.
    """
    text = parameters_text(request, index) if request.files.embed_metadata else None
    if request.files.output_format == "png":
        return _png(pixels, _png_text(text))
    options = {"quality": request.files.output_quality, "xmp": _XMP, **_exif(text)}
    if request.files.output_format == "jpg":
        # 3 ms for a photo-like megapixel, in which Pillow keeps Python's lock; optimize=True takes
        # 5 to 9 ms and saves 1 to 9 %.
        return _pillow(pixels, "JPEG", **options)
    # Method 0 takes 20 to 32 ms for the same; Pillow's default 4 takes 65 to 93 ms, saves up to
    # 5 % and is 0.5 to 1.2 dB better at the same quality.
    return _pillow(pixels, "WEBP", method=0, **options)


def most_bytes(request: GenerationRequest) -> int:
    """More than all files of a request together can be, whatever they show.

    Of its pixels' bytes, noise takes 1.00 times as PNG and, black and white at quality 100, 1.05
    times as WebP and 0.77 times as JPEG.
    """
    pixels = 3 * request.width * request.height * 9 // 8
    text = 4 * (len(request.prompt) + len(request.negative_prompt))
    return request.num_outputs * (pixels + text + _MOST_OTHER_BYTES)


def write(path: Path, data: bytes) -> None:
    """Write a file that, once it has its name, is complete."""
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_bytes(data)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _png(pixels: NDArray[np.uint8], info: PngImagePlugin.PngInfo) -> bytes:
    """A PNG of uint8 [H, W, 3] with the text chunks of info before the pixels.

    Per photo-like megapixel on one CPU core (benchmarks/encode.py): 8 ms and 0.84 MB. Pillow's
    level 1 takes 77 ms for 0.89 MB. fpng takes 5 ms for 1.09 MB, but keeps Python's lock
    throughout: its threads would neither run in parallel nor leave the GPU thread alone.
    """
    if isal_zlib is None:
        return _pillow(pixels, "PNG", compress_level=1, pnginfo=info)
    height, width, _ = pixels.shape
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits, RGB
        *(chunk[:2] for chunk in info.chunks),
        (b"IDAT", isal_zlib.compress(_up_filtered(pixels), 1)),
        (b"IEND", b""),
    ]
    return _PNG_SIGNATURE + b"".join(starmap(_png_chunk, chunks))


def _up_filtered(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Uint8 [H, W, 3] as PNG's scanlines [H, 1 + 3W]: each row less the row above it.

    One filter for all rows, Up: Sub makes photo-like images 5 to 12 % larger, and Paeth, which
    saves up to 8 %, takes 35 ms a megapixel in numpy, where Up takes 0.2.
    """
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, 3 * width)
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = _PNG_FILTER_UP
    lines[0, 1:] = rows[0]  # the row above the first one counts as zeros
    np.subtract(rows[1:], rows[:-1], out=lines[1:, 1:])
    return lines


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)])


def _png_text(text: str | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(PNG_TEXT_KEY, text)  # iTXt where Latin-1 does not do
    info.add_itxt(_PNG_XMP_KEY, _XMP)
    return info


def _exif(text: str | None) -> dict[str, bytes]:
    """Pillow's keyword for EXIF with the text as its UserComment, or none."""
    if text is None:
        return {}
    exif = Image.Exif()
    comment = _EXIF_UNICODE + text.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return {"exif": exif.tobytes()}


def _pillow(pixels: NDArray[np.uint8], pillow_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, pillow_format, **options)
    return buffer.getvalue()
