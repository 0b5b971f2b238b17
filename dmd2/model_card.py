"""What a model folder says of itself: dmd2.json, or what its other files imply."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmd2.errors import ModelError

CARD_FILE = "dmd2.json"
SDXL_FAST_DECODER = "taesdxl"
SAFETY_CHECKER = "nsfw-checker"
SDXL_TIMESTEPS: Mapping[int, tuple[int, ...]] = {4: (999, 749, 499, 249)}

_KEYS = {
    "name",
    "timesteps",
    "default_size",
    "license",
    "lora_scale",
    "fast_decoder",
    "safety_checker",
}


@dataclass(frozen=True)
class ModelCard:
    """A checkpoint's name and the limits that it was distilled for.

    Attributes:
        name: what metrics and metadata call the model.
        timesteps: per allowed step count, the timesteps in the order that they are run,
            each from 0 to 999 and strictly falling.
        default_size: (width, height) in pixels, multiples of 8.
        license: the licence of the weights, "" where the folder does not say.
        fast_decoder: the manifest's component that decodes this model's latents with fast_decode;
            None where none was made for them.
        can_decode_fast: whether that is loaded beside the model; no folder says it of itself.
        safety_checker: the manifest's component that classifies this model's images; None where
            what it can draw is harmless.
        checks_safety: whether that is loaded beside the model; no folder says it of itself.
    """

    name: str
    timesteps: Mapping[int, tuple[int, ...]]
    default_size: tuple[int, int]
    license: str = ""
    fast_decoder: str | None = SDXL_FAST_DECODER
    can_decode_fast: bool = False
    safety_checker: str | None = SAFETY_CHECKER
    checks_safety: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ModelError(f"{CARD_FILE}: name is empty")
        if not self.timesteps:
            raise ModelError(f"{CARD_FILE}: timesteps is empty; give at least one step count")
        for num_steps, timesteps in self.timesteps.items():
            _check_timesteps(num_steps, timesteps)
        width, height = self.default_size
        if width % 8 or height % 8 or min(width, height) < 64:
            raise ModelError(
                f"{CARD_FILE}: default_size {width}x{height} must be multiples of 8 from 64"
            )

    @property
    def default_steps(self) -> int:
        """The step count of a request that names none: the largest that was distilled."""
        return max(self.timesteps)

    @classmethod
    def read(cls, folder: Path) -> ModelCard:
        """The card of a model folder in diffusers' layout.

        Without dmd2.json, or for keys that it leaves out, the folder is a 4-step SDXL named
        after itself whose size is the UNet's sample_size times the VAE's factor.

        Raises:
            ModelError: a file is missing, unreadable or says something impossible.
        """
        path = folder / CARD_FILE
        said: dict[str, Any] = read_json(path) if path.exists() else {}
        unknown = set(said) - _KEYS
        if unknown:
            raise ModelError(f"{path}: unknown keys {sorted(unknown)}")
        try:
            timesteps = {
                int(steps): tuple(int(t) for t in values)
                for steps, values in said.get("timesteps", SDXL_TIMESTEPS).items()
            }
            width, height = said.get("default_size") or _native_size(folder)
            return cls(
                name=str(said.get("name", folder.resolve().name)),
                timesteps=timesteps,
                default_size=(int(width), int(height)),
                license=str(said.get("license", "")),
                fast_decoder=said.get("fast_decoder", SDXL_FAST_DECODER),
                safety_checker=said.get("safety_checker", SAFETY_CHECKER),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error


def check_readable(path: Path) -> None:
    """Raise ModelError where a file is there and this process may not read it."""
    if path.exists() and not os.access(path, os.R_OK):
        raise ModelError(
            f"{path} may not be read by this process (user {os.geteuid()}); its owner allows it by "
            f"chmod -R a+rX {path.parent}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; ModelError names the file that fails."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: the model folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def _native_size(folder: Path) -> tuple[int, int]:
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    sample_size = unet.get("sample_size", 128)
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    factor = 2 ** (len(vae["block_out_channels"]) - 1) if "block_out_channels" in vae else 8
    return width * factor, height * factor


def _check_timesteps(num_steps: int, timesteps: tuple[int, ...]) -> None:
    if num_steps != len(timesteps):
        raise ModelError(f"{CARD_FILE}: {num_steps} steps are given {len(timesteps)} timesteps")
    falling = all(a > b for a, b in pairwise(timesteps))
    if not falling or not all(0 <= t <= 999 for t in timesteps):
        raise ModelError(f"{CARD_FILE}: timesteps {list(timesteps)} must fall strictly in 999..0")
