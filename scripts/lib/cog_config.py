"""What cog.yaml and predict.py say of the container. Needs no package that the container lacks."""

from __future__ import annotations

from typing import Any

import yaml
from cog_schema import read_concurrency

from dmd2.settings import ROOT


def cog_config() -> dict[str, Any]:
    """cog.yaml."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return config


def container_environment() -> dict[str, str]:
    """The variables that Cog sets in the container, from cog.yaml and predict.py's decorator."""
    config = cog_config()
    source = (ROOT / "predict.py").read_text(encoding="utf-8")
    return {
        **dict(line.split("=", 1) for line in config["environment"]),
        "COG_PREDICT_TYPE_STUB": config["predict"],
        "COG_MAX_CONCURRENCY": str(read_concurrency(source)),
    }
