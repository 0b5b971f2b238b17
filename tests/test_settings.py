"""The environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmd2.errors import DMD2Error
from dmd2.settings import Settings


def test_defaults() -> None:
    settings = Settings.from_environment({"DMD2_MODEL": "sdxl-4step"})
    assert (settings.device, settings.dtype, settings.download) == ("auto", "auto", False)
    assert settings.max_batch is None
    assert settings.weights_dir.name == "weights"


def test_everything_can_be_set() -> None:
    settings = Settings.from_environment(
        {
            "DMD2_MODEL": "m",
            "DMD2_DEVICE": "cpu",
            "DMD2_DTYPE": "bfloat16",
            "DMD2_MEMORY": "low",
            "DMD2_MAX_BATCH": "8",
            "DMD2_COMPILE": "1",
            "DMD2_DOWNLOAD": "1",
            "DMD2_LORA_SCALE": "0.75",
            "DMD2_WEIGHTS_DIR": "/w",
            "DMD2_OUTPUT_DIR": "/o",
        }
    )
    assert settings == Settings(
        "m", "cpu", "bfloat16", "low", 8, True, True, 0.75, Path("/w"), Path("/o")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DMD2_MODEL", ""),
        ("DMD2_DEVICE", "tpu"),
        ("DMD2_DTYPE", "fp16"),
        ("DMD2_MEMORY", "little"),
        ("DMD2_MAX_BATCH", "0"),
        ("DMD2_MAX_BATCH", "many"),
        ("DMD2_MAX_BATCH", "²"),
        ("DMD2_COMPILE", "yes"),
        ("DMD2_DOWNLOAD", "yes"),
        ("DMD2_LORA_SCALE", "0"),
        ("DMD2_LORA_SCALE", "nan"),
        ("DMD2_LORA_SCALE", "strong"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(DMD2Error, match=name):
        Settings.from_environment({"DMD2_MODEL": "m", name: value})
