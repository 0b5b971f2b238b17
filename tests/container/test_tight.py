"""The container as SECURITY.md runs it: any user, read-only, without capabilities."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from containers import SETUP_S, tight
from hub_world import World
from model_folders import pixels_of
from numpy.typing import NDArray
from PIL import Image
from servers import images_of

from dmd2.settings import ROOT

pytestmark = pytest.mark.docker
USERS = ("1000:1000", "48213:48213")
# The hub of the tests has no safety checker.
UNCHECKED = {"DMD2_SAFETY": "off"}
DEPLOYMENT, *_ = yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "dmd2.yaml").read_text())
# What Kubernetes runs in a container to learn whether it is ready.
PROBE = DEPLOYMENT["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["exec"]["command"]
INPUTS = {"prompt": "a red circle on a blue background", "seed": 7}


@pytest.fixture(scope="module")
def scripts_predict(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NDArray[np.int16]]:
    """The pixels that scripts/predict makes on this machine, of a model."""
    return cache(lambda model: predicted(model, tmp_path_factory.mktemp("predicted") / "out.png"))


def predicted(model: str, to: Path) -> NDArray[np.int16]:
    inputs = [f"-i{name}={value}" for name, value in INPUTS.items()]
    environment = {"DMD2_PYTHON": sys.executable, "DMD2_DEVICE": "cpu", **UNCHECKED}
    command = [ROOT / "scripts" / "predict", *inputs, "--model", model, "-o", to]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return pixels_of(to)


def assert_same_picture(file: bytes, expected: NDArray[np.int16]) -> None:
    with Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(image).astype(np.int16)
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("model", ["demo", "demo-1step", "demo-lora"])
def test_the_demo(
    model: str, user: str, scripts_predict: Callable[[str], NDArray[np.int16]]
) -> None:
    with tight(model, user=user) as container:
        (file,) = images_of(container.ready().predict(INPUTS))
        assert "torchvision" not in container.log(), "an image processor that is not used"
        container.run(shlex.join(PROBE))
    assert_same_picture(file, scripts_predict(model))


@pytest.mark.parametrize(
    ("name", "user"), [("plain", USERS[0]), ("merged", USERS[0]), ("pickled", USERS[1])]
)
def test_a_model_that_the_downloader_installed_as_another_user(
    name: str, user: str, world: World, scripts_predict: Callable[[str], NDArray[np.int16]]
) -> None:
    """Its VAE was converted; its UNet copied, merged with a LoRA, or taken out of a pickle."""
    folder = world.install(name)
    inside = f"/src/weights/{name}"
    with tight(inside, user=user, mounts=[(folder, inside)], **UNCHECKED) as container:
        (file,) = images_of(container.ready().predict(INPUTS))
    assert_same_picture(file, scripts_predict(str(folder)))


def test_a_download_that_cannot_write_says_where_it_could() -> None:
    with tight("sdxl-4step", DMD2_DOWNLOAD="1") as container:
        health = container.server.wait_until_set_up(SETUP_S)
    assert health["status"] == "SETUP_FAILED"
    assert "DMD2_WEIGHTS_DIR" in health["setup"]["logs"]
    assert "Errno" not in health["setup"]["logs"].splitlines()[-1]
