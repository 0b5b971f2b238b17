"""What a model folder says of itself: dmd2.json, or what its other files imply."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "community_steps",
    "default_steps",
    "default_size",
    "license",
    "lora_scale",
    "lora_sha256",
    "base_sha256",
    "fast_decoder",
    "safety_checker",
}


@dataclass(frozen=True)
class ModelCard:
    """A checkpoint's name and the limits that it was distilled for.

    Attributes:
        name: what metrics and metadata call the model.
        timesteps: per step count that it was trained for, the timesteps in the order that they
            are run, each from 0 to 999 and strictly falling.
        default_size: (width, height) in pixels, multiples of 8.
        community_steps: the same for step counts that people use and nobody trained; none of those
            in timesteps.
        default_steps: the step count of a request that names none, of either; None is taken for
            the largest that was trained.
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
    community_steps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    default_steps: int | None = None
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
        for key in ("timesteps", "community_steps"):
            for num_steps, timesteps in getattr(self, key).items():
                _check_timesteps(key, num_steps, timesteps)
        self._settle_steps()
        width, height = self.default_size
        if width % 8 or height % 8 or min(width, height) < 64:
            raise ModelError(
                f"{CARD_FILE}: default_size {width}x{height} must be multiples of 8 from 64"
            )

    @property
    def all_timesteps(self) -> Mapping[int, tuple[int, ...]]:
        """The timesteps of every step count that is allowed."""
        return {**self.timesteps, **self.community_steps}

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
            default_steps = said.get("default_steps")
            width, height = said.get("default_size") or _native_size(folder)
            return cls(
                name=str(said.get("name", folder.resolve().name)),
                timesteps=_by_count(said.get("timesteps", SDXL_TIMESTEPS)),
                default_size=(int(width), int(height)),
                community_steps=_by_count(said.get("community_steps", {})),
                default_steps=None if default_steps is None else int(default_steps),
                license=str(said.get("license", "")),
                fast_decoder=said.get("fast_decoder", SDXL_FAST_DECODER),
                safety_checker=said.get("safety_checker", SAFETY_CHECKER),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error

    def _settle_steps(self) -> None:
        if both := self.timesteps.keys() & self.community_steps.keys():
            raise ModelError(
                f"{CARD_FILE}: community_steps has {min(both)} steps, which timesteps has too; "
                "leave them out of community_steps"
            )
        if self.default_steps is None:
            object.__setattr__(self, "default_steps", max(self.timesteps))
        elif self.default_steps not in self.all_timesteps:
            counts = ", ".join(map(str, sorted(self.all_timesteps)))
            raise ModelError(
                f"{CARD_FILE}: default_steps is {self.default_steps}, and must be one of the step "
                f"counts that it lists ({counts}); use one of those, or leave it out"
            )


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


def _by_count(said: Mapping[Any, Any]) -> dict[int, tuple[int, ...]]:
    return {int(steps): tuple(int(t) for t in values) for steps, values in said.items()}


def _check_timesteps(key: str, num_steps: int, timesteps: tuple[int, ...]) -> None:
    if num_steps != len(timesteps):
        raise ModelError(
            f"{CARD_FILE}: {key}: {num_steps} steps are given {len(timesteps)} timesteps; "
            "list one for each step"
        )
    falling = all(a > b for a, b in pairwise(timesteps))
    if not falling or not all(0 <= t <= 999 for t in timesteps):
        raise ModelError(
            f"{CARD_FILE}: {key}: timesteps {list(timesteps)} must fall strictly in 999..0"
        )
