"""Pixels to files: PNG, JPEG and WebP with the image's parameters inside."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin

from dmd2 import __version__
from dmd2.request import GenerationRequest

# The PNG text key and the text's layout that the common viewers and model sites read.
PNG_TEXT_KEY = "parameters"
_EXIF_UNICODE = b"UNICODE\0"


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
        "Version": f"dmd2-cog {__version__}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items()))
    return "\n".join(lines)


def encode(pixels: NDArray[np.uint8], request: GenerationRequest, index: int) -> bytes:
    """Image index of a request, uint8 [H, W, 3], as the bytes of its file."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    text = parameters_text(request, index) if request.embed_metadata else None
    if request.output_format == "png":
        # 0.12 s for a smooth megapixel on one CPU core; Pillow's default 6: 0.24 s, 12 % smaller.
        image.save(buffer, "PNG", compress_level=1, pnginfo=_png_text(text))
    elif request.output_format == "jpg":
        image.save(buffer, "JPEG", quality=request.output_quality, **_exif(text))
    else:
        image.save(buffer, "WEBP", quality=request.output_quality, **_exif(text))
    return buffer.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a file that, once it has its name, is complete."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(data)
    partial.rename(path)


def _png_text(text: str | None) -> PngImagePlugin.PngInfo | None:
    if text is None:
        return None
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_TEXT_KEY, text)  # iTXt where Latin-1 does not do
    return info


def _exif(text: str | None) -> dict[str, bytes]:
    """Pillow's keyword for EXIF with the text as its UserComment, or none."""
    if text is None:
        return {}
    exif = Image.Exif()
    comment = _EXIF_UNICODE + text.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return {"exif": exif.tobytes()}
