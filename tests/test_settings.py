"""The environment variables."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

from deploy.gateway.settings import GatewaySettings
from dmd2.errors import DMD2Error
from dmd2.settings import KNOWN, ROOT, Settings, _distance, unknown_variables


def test_defaults() -> None:
    settings = Settings.from_environment({"DMD2_MODEL": "sdxl-4step"})
    assert (settings.device, settings.dtype, settings.download) == ("auto", "auto", False)
    assert settings.max_batch is None
    assert (settings.tune, settings.compile) == ("quick", False)
    assert settings.weights_dir.name == "weights"
    assert (settings.lora_sources, settings.lora_dir) == ((), None)
    assert (settings.metrics_port, settings.metrics_host) == (None, "127.0.0.1")


def test_everything_can_be_set() -> None:
    settings = Settings.from_environment(
        {
            "DMD2_MODEL": "m",
            "DMD2_DEVICE": "cpu",
            "DMD2_DTYPE": "bfloat16",
            "DMD2_MEMORY": "low",
            "DMD2_MAX_BATCH": "8",
            "DMD2_TUNE": "force",
            "DMD2_COMPILE": "1",
            "DMD2_DOWNLOAD": "1",
            "DMD2_LORA_SCALE": "0.75",
            "DMD2_WEIGHTS_DIR": "/w",
            "DMD2_OUTPUT_DIR": "/o",
            "DMD2_KEEP_OUTPUTS_S": "500",
            "DMD2_MAX_OUTPUT_BYTES": "2000000",
            "DMD2_QUEUE_TIMEOUT_S": "10",
            "DMD2_RUN_TIMEOUT_S": "20.5",
            "DMD2_PROGRESS_FILE": "/p",
            "DMD2_SAFETY": "blur",
            "DMD2_LORA_SOURCES": "local, https",
            "DMD2_LORA_DIR": "/l",
            "DMD2_LORA_CACHE_DIR": "/c",
            "DMD2_LORA_CACHE_BYTES": "3000000",
            "DMD2_LORA_MERGED_BYTES": "0",
            "DMD2_METRICS_PORT": "9500",
            "DMD2_METRICS_HOST": "::",
            "DMD2_LOG_PROMPTS": "1",
            "DMD2_LOG_FORMAT": "json",
        }
    )
    assert settings == Settings(
        model="m",
        device="cpu",
        dtype="bfloat16",
        memory="low",
        max_batch=8,
        tune="force",
        compile=True,
        download=True,
        lora_scale=0.75,
        weights_dir=Path("/w"),
        output_dir=Path("/o"),
        keep_outputs_s=500.0,
        max_output_bytes=2_000_000,
        queue_timeout_s=10.0,
        run_timeout_s=20.5,
        progress_file=Path("/p"),
        safety="blur",
        lora_sources=("local", "https"),
        lora_dir=Path("/l"),
        lora_cache_dir=Path("/c"),
        lora_cache_bytes=3_000_000,
        lora_merged_bytes=0,
        metrics_port=9500,
        metrics_host="::",
        log_prompts=True,
        log_format="json",
    )


def test_local_loras_need_a_folder() -> None:
    with pytest.raises(DMD2Error, match="DMD2_LORA_DIR"):
        Settings.from_environment({"DMD2_MODEL": "m", "DMD2_LORA_SOURCES": "civitai,local"})
    assert (
        Settings.from_environment({"DMD2_MODEL": "m", "DMD2_LORA_SOURCES": ""}).lora_sources == ()
    )


def test_outputs_outlive_every_request_in_flight() -> None:
    environment = {"DMD2_MODEL": "m", "DMD2_KEEP_OUTPUTS_S": "1019"}
    with pytest.raises(DMD2Error, match=r"1019 is less than the 1020 s.*DMD2_RUN_TIMEOUT_S"):
        Settings.from_environment(environment)
    Settings.from_environment(environment | {"DMD2_RUN_TIMEOUT_S": "599"})


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
        ("DMD2_TUNE", "full"),
        ("DMD2_COMPILE", "yes"),
        ("DMD2_DOWNLOAD", "yes"),
        ("DMD2_QUEUE_TIMEOUT_S", "0"),
        ("DMD2_RUN_TIMEOUT_S", "nan"),
        ("DMD2_KEEP_OUTPUTS_S", "inf"),
        ("DMD2_KEEP_OUTPUTS_S", "an hour"),
        ("DMD2_MAX_OUTPUT_BYTES", "99999"),
        ("DMD2_MAX_OUTPUT_BYTES", "2GB"),
        ("DMD2_SAFETY", "on"),
        ("DMD2_LOG_PROMPTS", "yes"),
        ("DMD2_LOG_FORMAT", "xml"),
        ("DMD2_LORA_SCALE", "0"),
        ("DMD2_LORA_SCALE", "nan"),
        ("DMD2_LORA_SCALE", "strong"),
        ("DMD2_LORA_SOURCES", "hub"),
        ("DMD2_LORA_SOURCES", "huggingface civitai"),
        ("DMD2_LORA_CACHE_BYTES", "10GB"),
        ("DMD2_LORA_CACHE_BYTES", "999999"),
        ("DMD2_LORA_MERGED_BYTES", "-1"),
        ("DMD2_METRICS_PORT", ""),
        ("DMD2_METRICS_PORT", "0"),
        ("DMD2_METRICS_PORT", "65536"),
        ("DMD2_METRICS_PORT", "9500.0"),
        ("DMD2_METRICS_HOST", ""),
        ("DMD2_METRICS_HOST", "localhost"),
        ("DMD2_METRICS_HOST", "0.0.0.0:9500"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(DMD2Error, match=name):
        Settings.from_environment({"DMD2_MODEL": "m", name: value})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DMD2_MODELS", "DMD2_MODEL"),
        ("DMD2_model", "DMD2_MODEL"),
        ("DMD2_DEVCIE", "DMD2_DEVICE"),
        ("DMD2_MAXBATCH", "DMD2_MAX_BATCH"),
        ("DMD2_SAFTY", "DMD2_SAFETY"),
        ("DMD2_RUN_TIMEOUT", "DMD2_RUN_TIMEOUT_S"),
        ("DMD2_PYTHONS", "DMD2_PYTHON"),
    ],
)
def test_a_name_that_is_nearly_known_fails_and_is_told_the_name(name: str, meant: str) -> None:
    with pytest.raises(DMD2Error, match=f"{name} .* did you mean {meant}"):
        Settings.from_environment({"DMD2_MODEL": "m", name: "1"})


def test_any_other_unknown_name_is_only_told_of() -> None:
    environment = {"DMD2_MODEL": "m", "DMD2_PRECISION": "fp8", "DMD2_PYTHON": "p", "PATH": "x"}
    Settings.from_environment(environment)
    assert unknown_variables(environment) == ["DMD2_PRECISION"]


def test_distances() -> None:
    """Against the definition: the fewest changes of one letter, tried one after another."""
    words = ["", "a", "ab", "ba", "abc", "acb", "cab", "bca", "abcd", "dcba"]
    for one, other in combinations(words, 2):
        reached, distance = {one}, 0
        while other not in reached:
            reached |= {changed for word in reached for changed in changes(word)}
            distance += 1
        assert _distance(one, other) == _distance(other, one) == distance


def changes(word: str) -> set[str]:
    ends = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    left_out = {a + b[1:] for a, b in ends if b}
    return left_out.union(*({a + c + b, a + c + b[1:]} for a, b in ends for c in "abcd"))


def test_every_name_that_scripts_and_the_readme_use_is_known() -> None:
    paths = [path for folder in ("scripts", "deploy") for path in (ROOT / folder).rglob("*")]
    texts = [p.read_text() for p in paths if p.is_file() and p.suffix != ".pyc"]
    readme, on_scale = ((ROOT / name).read_text() for name in ("README.md", "docs/scale.md"))
    used = {name for text in [*texts, readme] for name in re.findall(r"DMD2_[A-Z0-9_]+", text)}
    assert used == set(KNOWN)
    engines, all_of_gateways = variables_of(Settings), variables_of(GatewaySettings)
    assert listed_in(readme) == engines
    assert listed_in(on_scale) == all_of_gateways - engines
    assert set(KNOWN) - engines - all_of_gateways == {"DMD2_PYTHON", "DMD2_IMAGE"}


def variables_of(settings: type[Settings] | type[GatewaySettings]) -> set[str]:
    return {f"DMD2_{field.name.upper()}" for field in fields(settings)}


def listed_in(text: str) -> set[str]:
    return set(re.findall(r"^\| `(DMD2_\w+)` \|", text, flags=re.MULTILINE))
