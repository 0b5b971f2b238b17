"""LoRAs as clients of the real server ask for them; the operator allows a folder's files alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from cog_server import CogServer
from drawn_loras import low_rank
from PIL import Image
from safetensors.torch import load_file, save_file
from servers import images_of

ASKED = {"prompt": "a red circle", "seed": 7}


@pytest.fixture(scope="module", autouse=True)
def lora_files(server_folder: Path, model_folder: Path) -> None:
    """A LoRA that fits the server's model, and a file that is none, in the operator's folder."""
    weights = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    shapes = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): tensor.shape
        for name, tensor in weights.items()
        if name.endswith("conv1.weight") or name.endswith("to_out.0.weight")
    }
    save_file(low_rank(shapes, rank=3, alpha=2.0), server_folder / "loras" / "drawn.safetensors")
    (server_folder / "loras" / "broken.safetensors").write_bytes(b"PK" + bytes(100))


def pixels(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image).astype(np.int16)


def test_a_lora_changes_the_image_and_is_named(server: CogServer) -> None:
    (without,) = images_of(server.predict(ASKED))
    answer = server.predict({**ASKED, "lora_weights": "drawn.safetensors", "lora_scale": 0.5})
    (found,) = images_of(answer)
    assert np.abs(pixels(found) - pixels(without)).max() > 5
    (lora,) = answer["metrics"]["loras"]
    assert (lora["name"], lora["scale"], len(lora["sha256"])) == ("drawn", 0.5, 64)
    assert answer["metrics"]["ways"]["step"] == "plain"
    with Image.open(io.BytesIO(found)) as image:
        text = image.info["parameters"]
    assert f'Lora hashes: "drawn: {lora["sha256"][:10]}"' in text
    assert 'Lora scales: "drawn: 0.5"' in text
    after = server.predict(ASKED)
    assert images_of(after) == [without], "nothing of it is left"
    assert "loras" not in after["metrics"]


def test_two_at_once_and_a_scale_of_nothing(server: CogServer) -> None:
    both = {**ASKED, "lora_weights": "drawn.safetensors", "extra_lora": "drawn.safetensors"}
    (twice,) = images_of(server.predict({**both, "lora_scale": 0.25, "extra_lora_scale": 0.25}))
    (once,) = images_of(server.predict({**both, "lora_scale": 0.5, "extra_lora_scale": 0}))
    assert np.abs(pixels(twice) - pixels(once)).max() <= 1
    answer = server.predict({**both, "extra_lora_scale": 0})
    assert "extra_lora_scale 0 leaves nothing of extra_lora" in answer["logs"]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"lora_weights": "none.safetensors"}, "drawn.safetensors"),
        ({"lora_weights": "broken.safetensors"}, "lora_weights"),
        ({"lora_weights": "owner/repo"}, "DMD2_LORA_SOURCES"),
        ({"lora_weights": "https://example.org/x.safetensors?key=hush"}, "DMD2_LORA_SOURCES"),
        ({"lora_scale": 1.0}, "lora_weights, which is empty"),
        ({"extra_lora": "drawn.safetensors"}, "lora_weights has no first"),
    ],
)
def test_what_cannot_be_had_is_said(
    inputs: dict[str, object], said: str, server: CogServer, server_folder: Path
) -> None:
    answer = server.predict({**ASKED, **inputs, "hf_api_token": "hush"})
    assert answer["status"] == "failed"
    assert said in answer["error"]
    assert "hush" not in answer["error"] + answer["logs"]
    assert "hush" not in (server_folder / "log").read_text(errors="replace")
