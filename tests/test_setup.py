"""Predictor.setup: which model it loads, and that it fetches nothing unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

import predict
from dmd2.errors import MissingWeightsError


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
    monkeypatch.setattr(predict, "install", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setenv("DMD2_MODEL", model.format(folder=model_folder))
    monkeypatch.setenv("DMD2_DOWNLOAD", download)
    monkeypatch.setenv("DMD2_LORA_SCALE", "0.5")
    monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setenv("DMD2_OUTPUT_DIR", str(tmp_path / "outputs"))
    monkeypatch.setenv("DMD2_DEVICE", "cpu")
    predictor = predict.Predictor()
    if model == "sdxl-4step":
        with pytest.raises(MissingWeightsError, match="scripts/download-weights sdxl-4step"):
            predictor.setup()
    else:
        predictor.setup()
        assert predictor.engine.card.name == "tiny"
        predictor.engine.close()
    assert calls == ([(("sdxl-4step", tmp_path), {"lora_scale": 0.5})] if fetched else [])
