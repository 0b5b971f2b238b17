"""The environment variables that this package reads, all of them, in one place."""

from __future__ import annotations

import ipaddress
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmd2.errors import DMD2Error

SafetyMode = Literal["withhold", "blur", "flag", "off"]
LogFormat = Literal["text", "json"]
LoraSource = Literal["local", "huggingface", "civitai", "https"]
TuneMode = Literal["off", "quick", "force", "eager"]

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16", "float32")
MEMORY_MODES = ("auto", "full", "low")
SAFETY_MODES: tuple[SafetyMode, ...] = ("withhold", "blur", "flag", "off")
TUNE_MODES: tuple[TuneMode, ...] = ("off", "quick", "force", "eager")
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
LORA_SOURCES: tuple[LoraSource, ...] = ("local", "huggingface", "civitai", "https")
MAX_LORA_SCALE = 2.0
MAX_BATCH = 64
MAX_SECONDS = 10_000_000
MAX_PORT = 65_535
MAX_TYPOS = 2
MIN_OUTPUT_BYTES = 100_000
MIN_LORA_CACHE_BYTES = 1_000_000
# After predict has returned, Cog's server still reads the files, and uploads them if told to.
HANDING_OVER_S = 120.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """How a process runs the engine.

    Attributes:
        model: DMD2_MODEL, an entry of weights/manifest.json or the path of a model folder.
        device: DMD2_DEVICE, "auto" (CUDA where there is one), "cpu" or "cuda".
        dtype: DMD2_DTYPE, "auto" (float16 on CUDA, float32 on CPU) or a dtype's name.
        memory: DMD2_MEMORY, "auto" (low on a CUDA device with less than 11 GB), "full" or "low".
        max_batch: DMD2_MAX_BATCH, how many images share a step; None ("auto") is measured at setup.
        tune: DMD2_TUNE, "quick" has setup measure and judge faster ways to call the models, "off"
            takes none, "force" takes each that can be built, without a look: for tests, and
            "eager" likewise, but none that keeps memory, as CUDA graphs do.
        compile: DMD2_COMPILE, "1" has setup compile the models; a minute or more for each start.
        download: DMD2_DOWNLOAD, "1" lets setup fetch missing weights; "0" never does.
        lora_scale: DMD2_LORA_SCALE, the strength that such a download merges a LoRA at.
        weights_dir: DMD2_WEIGHTS_DIR, where models are installed.
        output_dir: DMD2_OUTPUT_DIR, where each request gets a folder for its images.
        keep_outputs_s: DMD2_KEEP_OUTPUTS_S, after so many seconds such a folder is deleted.
        max_output_bytes: DMD2_MAX_OUTPUT_BYTES, that outputs may take together; None ("auto") is
            half of what the disk has free at setup.
        queue_timeout_s: DMD2_QUEUE_TIMEOUT_S, the longest that a request waits for its first step.
        run_timeout_s: DMD2_RUN_TIMEOUT_S, the longest that it takes from then on.
        progress_file: DMD2_PROGRESS_FILE, which gets a line of JSON for each image of each unit of
            work; None for none.
        safety: DMD2_SAFETY, what becomes of an image that the safety checker flags; "off" loads
            no safety checker.
        lora_sources: DMD2_LORA_SOURCES, where the LoRAs of requests may come from, any of
            LORA_SOURCES with commas between; empty for nowhere.
        lora_dir: DMD2_LORA_DIR, the folder whose files are "local".
        lora_cache_dir: DMD2_LORA_CACHE_DIR, where fetched LoRAs are kept.
        lora_cache_bytes: DMD2_LORA_CACHE_BYTES, that they may take together.
        lora_merged_bytes: DMD2_LORA_MERGED_BYTES, that weights with LoRAs added may take of the
            device's memory, beside the model's own; None ("auto") is as many as those have.
        metrics_port: DMD2_METRICS_PORT, where Prometheus finds metrics; None for nowhere.
        metrics_host: DMD2_METRICS_HOST, the address that this port is opened on.
        log_prompts: DMD2_LOG_PROMPTS, "1" lets the server's log hold prompts.
        log_format: DMD2_LOG_FORMAT, "text" or "json", one object a line.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"
    max_batch: int | None = None
    tune: TuneMode = "quick"
    compile: bool = False
    download: bool = False
    lora_scale: float = 1.0
    weights_dir: Path = ROOT / "weights"
    output_dir: Path = Path(tempfile.gettempdir()) / "dmd2-outputs"
    keep_outputs_s: float = 3600.0
    max_output_bytes: int | None = None
    queue_timeout_s: float = 300.0
    run_timeout_s: float = 600.0
    progress_file: Path | None = None
    safety: SafetyMode = "withhold"
    lora_sources: tuple[LoraSource, ...] = ()
    lora_dir: Path | None = None
    lora_cache_dir: Path = Path(tempfile.gettempdir()) / "dmd2-loras"
    lora_cache_bytes: int = 10_000_000_000
    lora_merged_bytes: int | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    log_prompts: bool = False
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        longest = self.queue_timeout_s + self.run_timeout_s + HANDING_OVER_S
        if self.lora_sources:  # before a request is queued, its LoRAs may take as long
            longest += self.queue_timeout_s
        if self.keep_outputs_s < longest:
            raise DMD2Error(
                f"DMD2_KEEP_OUTPUTS_S={self.keep_outputs_s:g} is less than the {longest:g} s that "
                "a request may be under way (DMD2_QUEUE_TIMEOUT_S + DMD2_RUN_TIMEOUT_S + "
                f"{HANDING_OVER_S:g}), so that its images could be deleted too early"
            )
        if "local" in self.lora_sources and self.lora_dir is None:
            raise DMD2Error("DMD2_LORA_SOURCES has local: name the folder, DMD2_LORA_DIR")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings that environ asks for.

        Raises:
            DMD2Error: DMD2_MODEL is missing, a variable holds what it may not, or one that is
                unknown is all but one that is known.
        """
        for name in unknown_variables(environ):
            if meant := next((known for known in KNOWN if _are_alike(name, known)), None):
                raise DMD2Error(f"{name} is not a variable that is read: did you mean {meant}?")
        if not environ.get("DMD2_MODEL"):
            raise DMD2Error(
                "DMD2_MODEL is not set: name an entry of weights/manifest.json "
                "(such as sdxl-4step) or give the path of a model folder"
            )
        set_here = [name for name in _READERS if name in environ]
        values = {_field(name): _READERS[name](name, environ[name]) for name in set_here}
        return cls(**values)


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The variables that look like this project's, and that nothing reads."""
    return sorted(name for name in environ if name.startswith("DMD2_") and name not in KNOWN)


def _field(name: str) -> str:
    """The attribute of Settings that a variable sets."""
    return name.removeprefix("DMD2_").lower()


def _one_of(choices: Sequence[str]) -> Callable[[str, str], str]:
    def read(name: str, text: str) -> str:
        if text not in choices:
            raise DMD2Error(f"{name}={text!r} is not one of {', '.join(choices)}")
        return text

    return read


def _switch(name: str, text: str) -> bool:
    return _one_of(("0", "1"))(name, text) == "1"


def _seconds(name: str, text: str) -> float:
    value = _number(text)
    if not 0 < value <= MAX_SECONDS:
        raise DMD2Error(
            f"{name}={text!r} is not a number of seconds above 0, at most {MAX_SECONDS}"
        )
    return value


def _max_batch(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_BATCH:
        raise DMD2Error(f"{name}={text!r} is neither auto nor a number from 1 to {MAX_BATCH}")
    return int(text)


def _max_output_bytes(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < MIN_OUTPUT_BYTES:
        raise DMD2Error(
            f"{name}={text!r} is neither auto nor a number of bytes from {MIN_OUTPUT_BYTES}"
        )
    return int(text)


def _lora_sources(name: str, text: str) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    return tuple(_one_of(LORA_SOURCES)(name, word) for word in words)


def _lora_cache_bytes(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < MIN_LORA_CACHE_BYTES:
        raise DMD2Error(f"{name}={text!r} is not a number of bytes from {MIN_LORA_CACHE_BYTES}")
    return int(text)


def _lora_merged_bytes(name: str, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit():
        raise DMD2Error(f"{name}={text!r} is neither auto nor a number of bytes")
    return int(text)


def _port(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_PORT:
        raise DMD2Error(
            f"{name}={text!r} is not a port, from 1 to {MAX_PORT}; left out, none is opened"
        )
    return int(text)


def _address(name: str, text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise DMD2Error(
            f"{name}={text!r} is not an IP address, such as 127.0.0.1, or 0.0.0.0 for every one "
            "that this machine has"
        ) from None


def _scale(name: str, text: str) -> float:
    value = _number(text)
    if not 0 < value <= MAX_LORA_SCALE:
        raise DMD2Error(f"{name}={text!r} is not a number above 0 and at most {MAX_LORA_SCALE:g}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _are_alike(one: str, other: str) -> bool:
    """Whether two names are within two letters of each other, whatever their case."""
    return _distance(one.upper(), other.upper()) <= MAX_TYPOS


def _distance(one: str, other: str) -> int:
    """How many letters must be put in, left out or changed (Levenshtein, 1966)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, its_letter in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != its_letter)))
    return row[-1]


# How each variable of a server is read; what it sets is the attribute of the same name.
_READERS: Mapping[str, Callable[[str, str], Any]] = {
    "DMD2_MODEL": lambda name, text: text,
    "DMD2_DEVICE": _one_of(DEVICES),
    "DMD2_DTYPE": _one_of(DTYPES),
    "DMD2_MEMORY": _one_of(MEMORY_MODES),
    "DMD2_MAX_BATCH": _max_batch,
    "DMD2_TUNE": _one_of(TUNE_MODES),
    "DMD2_COMPILE": _switch,
    "DMD2_DOWNLOAD": _switch,
    "DMD2_LORA_SCALE": _scale,
    "DMD2_WEIGHTS_DIR": lambda name, text: Path(text),
    "DMD2_OUTPUT_DIR": lambda name, text: Path(text),
    "DMD2_KEEP_OUTPUTS_S": _seconds,
    "DMD2_MAX_OUTPUT_BYTES": _max_output_bytes,
    "DMD2_QUEUE_TIMEOUT_S": _seconds,
    "DMD2_RUN_TIMEOUT_S": _seconds,
    "DMD2_PROGRESS_FILE": lambda name, text: Path(text),
    "DMD2_SAFETY": _one_of(SAFETY_MODES),
    "DMD2_LORA_SOURCES": _lora_sources,
    "DMD2_LORA_DIR": lambda name, text: Path(text),
    "DMD2_LORA_CACHE_DIR": lambda name, text: Path(text),
    "DMD2_LORA_CACHE_BYTES": _lora_cache_bytes,
    "DMD2_LORA_MERGED_BYTES": _lora_merged_bytes,
    "DMD2_METRICS_PORT": _port,
    "DMD2_METRICS_HOST": _address,
    "DMD2_LOG_PROMPTS": _switch,
    "DMD2_LOG_FORMAT": _one_of(LOG_FORMATS),
}
# What scripts/ and the gateway read, and a server's environment may hold.
_READ_ELSEWHERE = (
    "DMD2_PYTHON",
    "DMD2_IMAGE",
    "DMD2_API_TOKEN",
    "DMD2_MAX_QUEUED",
    "DMD2_JOURNAL_DIR",
    "DMD2_PUBLIC_URL",
    "DMD2_WEBHOOK_HOSTS",
    "DMD2_WEBHOOK_SECRET",
    "DMD2_SERVES",
    "DMD2_CELL",
)
KNOWN = (*_READERS, *_READ_ELSEWHERE)
