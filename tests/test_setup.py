"""Predictor.setup: which model it loads, that it fetches nothing unasked, and what stops it.

What it raises is what Cog's server shows: tests/server/test_faults.py looks at that once.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from model_folders import copy_with

import predict
from dmd2.errors import DMD2Error, MissingWeightsError, ModelError
from dmd2.store import provision


@pytest.mark.parametrize(
    ("model", "download", "fetched"),
    [("sdxl-4step", "0", False), ("sdxl-4step", "1", True), ("{folder}", "1", False)],
)
def test_setup_fetches_only_when_told_to(
    model: str,
    download: str,
    fetched: bool,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(
        provision,
        "install",
        lambda name, folder, lora_scale=1.0, **_: calls.append((name, folder, lora_scale)),
    )
    monkeypatch.setenv("DMD2_MODEL", model.format(folder=model_folder))
    monkeypatch.setenv("DMD2_DOWNLOAD", download)
    monkeypatch.setenv("DMD2_LORA_SCALE", "0.5")
    monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("DMD2_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.setenv("DMD2_DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # so that it cannot be imported
    predictor = predict.Predictor()
    if model == "sdxl-4step":
        with pytest.raises(MissingWeightsError, match="scripts/download-weights sdxl-4step"):
            predictor.setup()
    else:
        predictor.setup()
        assert predictor.service.card.name == "tiny"
        predictor.service.engine.close()
    wanted = [("sdxl-4step", tmp_path, 0.5), ("nsfw-checker", tmp_path, 1.0)]
    assert calls == (wanted if fetched else [])


def test_a_variable_that_nothing_reads_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DMD2_MODEL", str(tmp_path))
    monkeypatch.setenv("DMD2_PRECISION", "fp8")
    with pytest.raises(ModelError):
        predict.Predictor().setup()
    assert "DMD2_PRECISION is set, and nothing reads it" in capfd.readouterr().err


def test_no_safety_checker_is_fetched_for_a_server_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(provision, "install", lambda name, *_, **__: fetched.append(name))
    for name, value in {
        "DMD2_MODEL": "sdxl-1step",
        "DMD2_DOWNLOAD": "1",
        "DMD2_SAFETY": "off",
        "DMD2_WEIGHTS_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingWeightsError):
        predict.Predictor().setup()
    assert fetched == ["sdxl-1step"]


def test_a_broken_folder_is_told_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setenv("DMD2_MODEL", str(tmp_path))
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        predict.Predictor().setup()


def test_a_metrics_port_that_is_taken_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("DMD2_MODEL", str(tmp_path))
        monkeypatch.setenv("DMD2_METRICS_PORT", str(port))
        with pytest.raises(DMD2Error, match=f"DMD2_METRICS_PORT={port} of .*: Address already in"):
            predict.Predictor().setup()
    with pytest.raises(ModelError):
        predict.Predictor().setup()


def test_a_missing_safety_checker_is_told_how_to_get_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_with(
        model_folder, tmp_path / "tiny", "dmd2.json", lambda card: card.pop("safety_checker")
    )
    monkeypatch.setenv("DMD2_MODEL", str(model))
    monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(MissingWeightsError, match="`scripts/download-weights nsfw-checker`"):
        predict.Predictor().setup()
