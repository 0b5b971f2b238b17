"""Which model a checkpoint of other people is, by its header or configs, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd2.errors import DownloadError, LoraError
from dmd2.loras.header import read_header

Shape = tuple[int, ...]

# How the keys of each part begin in a single file, which has the layout of Stability's own code.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
SIGMAS = "denoiser.sigmas"
NOT_V = (
    "DMD2 was trained on noise prediction, and nothing is known to make it work with the other. "
    "Take a version for noise prediction (epsilon)"
)
_VAE = "first_stage_model."
_PASSED_OVER = re.compile(r"model_ema\..*|(.*\.)?(logit_scale|position_ids)")
_V_KEYS = {"v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
UNKNOWN_LICENSE = "not said by the file: look where it comes from"
_FULL_DTYPES, _FP8_DTYPES = {"F16", "BF16", "F32", "F64"}, {"F8_E4M3", "F8_E5M2"}
# What keys say of a file that is no SDXL checkpoint; tried in this order.
_OTHERS = (
    (
        r"(^|\.)(double|single|joint)_blocks\.|^single_transformer_blocks\.",
        "it is Flux, SD3 or another transformer, not SDXL",
    ),
    (r"^edm_(mean|std)$", "it is Playground v2.5, whose noise schedule (EDM) is not SDXL's"),
    (r"^cond_stage_model\.", "it is Stable Diffusion 1 or 2, not SDXL"),
    (r"^conditioner\.embedders\.0\.model\.", "it is SDXL's refiner, not a base model"),
    (
        r"\.lora_(down|up|A|B)|\.(hada|lokr)_w1|\.lora\.(down|up)\.",
        "it is a LoRA: give it as --lora",
    ),
    (
        r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.",
        "it is a UNet alone, with diffusers' names: give the whole folder, or its repository",
    ),
)
# Names and titles of what was distilled before, or predicts otherwise without saying so in a key.
_FEW_STEPS = re.compile(
    r"turbo|lightning|hyper|flash|[1-8][ _-]?steps?|(?<![a-z])(lcm|tcd|pcm|dmd2?)(?![a-z])", re.I
)
_TITLES = [f"modelspec.{key}" for key in ("title", "description", "tags", "merged_from")]
_NAMED_V = re.compile(r"v[ _-]?pred", re.I)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors.

    Attributes:
        shapes: of each tensor.
        dtypes: of each, as safetensors calls them.
        metadata: whatever else its writer put there.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def kept(self) -> list[str]:
        """The keys that count: without those that every reader of such files passes over."""
        return [key for key in self.shapes if not _PASSED_OVER.fullmatch(key)]

    @classmethod
    def read(cls, path: Path) -> Header:
        """That of a file.

        Raises:
            DownloadError: it is no safetensors file, by its content, or cannot be read.
        """
        try:
            with path.open("rb") as file:
                said = read_header(file)
            metadata = said.pop("__metadata__", {})
            shapes = {key: tuple(each["shape"]) for key, each in said.items()}
            dtypes = {key: str(each["dtype"]) for key, each in said.items()}
        except LoraError as error:
            raise DownloadError(f"{path.name}: {error}") from error
        except OSError as error:
            raise DownloadError(f"{path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError) as error:
            raise DownloadError(f"{path.name}: its header is malformed. Fetch it again") from error
        return cls(shapes, dtypes, metadata)


def check_kind(name: str, header: Header) -> None:
    """Refuse a single file that is no whole SDXL base model with noise prediction.

    Raises:
        DownloadError: so it is, with the reason and the way out.
    """
    reason = _what_it_is(header) or _what_it_lacks(header) or _bad_tensor(header)
    if reason is not None:
        raise DownloadError(f"{name} is refused: {reason}")


def warnings_of(name: str, header: Header) -> list[str]:
    """What a file's user should know of it that is no reason to refuse it."""
    said = " ".join([name, *(str(header.metadata.get(key, "")) for key in _TITLES)])
    warnings = []
    if found := _FEW_STEPS.search(said):
        warnings.append(
            f"{name} seems to be made for few steps already ({found[0]}): with DMD2 on top of "
            "that, images burn. Take the version that it was made from"
        )
    if found := _NAMED_V.search(said):
        warnings.append(f"{name} seems to be made for v-prediction ({found[0]}): {NOT_V}")
    if _FP8_DTYPES & set(header.dtypes.values()):
        warnings.append(f"{name} is in fp8, which has lost quality already: take a float16 version")
    return warnings


def check_configs(name: str, unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Refuse a folder whose configs say that it is no SDXL base model with noise prediction.

    Raises:
        DownloadError: so it is, with the reason and the way out.
    """
    if scheduler.get("prediction_type", "epsilon") != "epsilon":
        reason = f"its scheduler says {scheduler['prediction_type']}: {NOT_V}"
    elif scheduler.get("rescale_betas_zero_snr"):
        reason = f"its scheduler says zero-terminal SNR: {NOT_V}"
    elif unet.get("in_channels", 4) != 4:
        reason = of_channels(unet["in_channels"])
    elif unet.get("addition_embed_type") != "text_time":
        reason = "it is not SDXL: its UNet is told no sizes. Take a model that was made from SDXL"
    else:
        return
    raise DownloadError(f"{name} is refused: {reason}")


def _what_it_is(header: Header) -> str | None:
    """What other kind of file it is, by its markers."""
    if marks := sorted(_V_KEYS & header.shapes.keys()):
        return f"it is made for v-prediction, or for zero-terminal SNR ({marks[0]}): {NOT_V}"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if str(said := header.metadata.get(key, "")).lower().startswith("v"):
            return f"it is made for v-prediction ({key} is {said}): {NOT_V}"
    for pattern, kind in _OTHERS:
        if found := next((key for key in header.shapes if re.search(pattern, key[:500])), None):
            return f"{kind} ({ascii(found)[1:-1][:100]}). Take an SDXL base model"
    first = header.shapes.get(f"{PREFIXES['unet']}input_blocks.0.0.weight", ())
    return of_channels(first[1]) if len(first) == 4 and first[1] != 4 else None


def of_channels(channels: int) -> str:
    """What a UNet is whose first convolution takes another number of channels than SDXL's."""
    kind = {8: "for editing by instruction", 9: "for inpainting"}.get(channels, "of another kind")
    return (
        f"it is a UNet {kind} ({channels} channels in, where SDXL has 4), whose weights DMD2's do "
        "not fit. Take the model that it was made from"
    )


def _what_it_lacks(header: Header) -> str | None:
    for part, prefix in PREFIXES.items():
        if not any(key.startswith(prefix) for key in header.shapes):
            return f"it has no {part} (no key begins with {prefix}). Take a whole checkpoint"
    return None


def _bad_tensor(header: Header) -> str | None:
    """A key of no model's part, or a dtype that is not converted."""
    known = (*PREFIXES.values(), _VAE)
    unknown = [k for k in header.kept if not k.startswith(known) and k != SIGMAS]
    if unknown:
        return of_unknown(unknown)
    return of_dtypes(header, [k for k in header.kept if k.startswith(tuple(PREFIXES.values()))])


def of_dtypes(header: Header, keys: Iterable[str]) -> str | None:
    """What is wrong with the dtypes of tensors; None for nothing."""
    for key in keys:
        if header.dtypes[key] not in _FULL_DTYPES | _FP8_DTYPES:
            return (
                f"its {key} is of dtype {header.dtypes[key]}, which is not converted. Take a "
                "version in float16, bfloat16 or float32"
            )
    return None


def of_unknown(keys: Sequence[str]) -> str:
    """What is wrong with a file that has such keys, the first three of them named."""
    first = ", ".join(ascii(key)[1:-1][:100] for key in sorted(keys)[:3])
    return f"it has {len(keys)} keys that SDXL has not ({first}). Take another version"
