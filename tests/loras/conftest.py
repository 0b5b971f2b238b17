"""A tiny SDXL for LoRAs: its weights, the names of its modules, and stock diffusers with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from dmd2.loras.names import MODEL_PARTS, ModuleNames

Weights = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="session")
def stock(model_folder: Path) -> Callable[[], Any]:
    """Makes a stock pipeline whose models nobody else has."""
    whole = StableDiffusionXLPipeline.from_pretrained(model_folder, dtype=torch.float32)
    rest = {name: part for name, part in whole.components.items() if name not in MODEL_PARTS}

    def make() -> Any:
        models = {part: copy.deepcopy(getattr(whole, part)) for part in MODEL_PARTS}
        return StableDiffusionXLPipeline(**rest, **models)

    return make


@pytest.fixture(scope="session")
def weights(stock: Callable[[], Any]) -> Weights:
    pipe = stock()
    return {part: dict(getattr(pipe, part).state_dict()) for part in MODEL_PARTS}


@pytest.fixture(scope="session")
def names(weights: Weights) -> ModuleNames:
    return ModuleNames.of(weights)
