"""The safety checker: an image classifier, and what becomes of an image that it flags."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors import SafetensorError
from transformers import ViTForImageClassification

from dmd2.errors import ModelError
from dmd2.model_card import check_readable, read_json

log = logging.getLogger(__name__)

UNSAFE_LABEL = "nsfw"
# The two classes are told apart by the larger probability.
_THRESHOLD = 0.5
_PIL_BILINEAR = 2


def is_flagged(nsfw_score: float | None) -> bool:
    """Whether an image is not to be believed safe; a score that is none, or no number, flags it."""
    return nsfw_score is None or not nsfw_score < _THRESHOLD


def blurred(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture [H, W, 3] with nothing left to recognise but its colours."""
    radius = max(pixels.shape[:2]) / 16
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


class SafetyChecker:
    """A ViTForImageClassification whose classes include "nsfw", on the device of its weights.

    Args:
        model: transformers' model.
        folder: its folder, with preprocessor_config.json.

    Raises:
        ModelError: the folder describes other classes, or a preprocessing that this is not.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        labels = {label.lower(): int(index) for index, label in model.config.id2label.items()}
        if UNSAFE_LABEL not in labels:
            raise ModelError(f"{folder}: its classes {sorted(labels)} have no {UNSAFE_LABEL!r}")
        self._unsafe_index = labels[UNSAFE_LABEL]
        path = folder / "preprocessor_config.json"
        said = read_json(path)
        if not all(said.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")):
            raise ModelError(f"{path}: images must be resized, rescaled and normalised")
        if said.get("resample", _PIL_BILINEAR) != _PIL_BILINEAR:
            raise ModelError(f"{path}: resample {said['resample']} is not 2, bilinear")
        self._size = (int(said["size"]["height"]), int(said["size"]["width"]))
        mean, std = (torch.tensor(said[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
        self._mean, self._std = mean.to(model.device), std.to(model.device)

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype) -> SafetyChecker:
        """The classifier in a folder: config.json, preprocessor_config.json, model.safetensors.

        Raises:
            ModelError: a file or a key is missing, unexpected or wrongly shaped, or as above.
        """
        check_readable(folder / "model.safetensors")
        try:
            model, found = ViTForImageClassification.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded: {error}") from error
        problems = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}
        if problems:
            raise ModelError(f"{folder} does not fit its config.json: {problems}")
        return cls(model.to(device).eval().requires_grad_(False), folder)

    @torch.inference_mode()
    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """The probability of "nsfw" of each image, as transformers' ViTImageProcessor prepares it.

        A failure does not raise: its score is NaN, which flags the image.

        Args:
            pixels: uint8 [B, H, W, 3] on the model's device.

        Returns:
            float32 [B], 0 to 1 or NaN, on the model's device.
        """
        try:
            logits = self._model(pixel_values=self._prepared(pixels), return_dict=True).logits
            return torch.softmax(logits.float(), dim=1)[:, self._unsafe_index]
        except torch.OutOfMemoryError:  # whoever asked has a way to go on with less
            raise
        except Exception:
            log.exception("the safety checker failed: its images are taken for unsafe")
            return torch.full((len(pixels),), torch.nan, device=pixels.device)

    def _prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels as float [B, 3, h, w] at the model's own size, resized as Pillow does."""
        resized = torch.nn.functional.interpolate(
            pixels.permute(0, 3, 1, 2).float(), size=self._size, mode="bilinear", antialias=True
        ).round()
        return ((resized / 255 - self._mean) / self._std).to(self._model.dtype)
