"""The environment variables that this package reads, all of them, in one place."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from dmd2.errors import DMD2Error

SafetyMode = Literal["withhold", "blur", "flag", "off"]
LogFormat = Literal["text", "json"]
Choice = TypeVar("Choice", bound=str)

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16", "float32")
MEMORY_MODES = ("auto", "full", "low")
SAFETY_MODES: tuple[SafetyMode, ...] = ("withhold", "blur", "flag", "off")
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
MAX_LORA_SCALE = 2.0
MAX_BATCH = 64
MAX_SECONDS = 10_000_000
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
        compile: DMD2_COMPILE, "1" has setup compile the models; a minute or more for each start.
        download: DMD2_DOWNLOAD, "1" lets setup fetch missing weights; "0" never does.
        lora_scale: DMD2_LORA_SCALE, the strength that such a download merges a LoRA at.
        weights_dir: DMD2_WEIGHTS_DIR, where models are installed.
        output_dir: DMD2_OUTPUT_DIR, where each request gets a folder for its images.
        keep_outputs_s: DMD2_KEEP_OUTPUTS_S, after so many seconds such a folder is deleted.
        queue_timeout_s: DMD2_QUEUE_TIMEOUT_S, the longest that a request waits for its first step.
        run_timeout_s: DMD2_RUN_TIMEOUT_S, the longest that it takes from then on.
        safety: DMD2_SAFETY, what becomes of an image that the safety checker flags; "off" loads
            no safety checker.
        log_prompts: DMD2_LOG_PROMPTS, "1" lets the server's log hold prompts.
        log_format: DMD2_LOG_FORMAT, "text" or "json", one object a line.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    memory: str = "auto"
    max_batch: int | None = None
    compile: bool = False
    download: bool = False
    lora_scale: float = 1.0
    weights_dir: Path = ROOT / "weights"
    output_dir: Path = Path(tempfile.gettempdir()) / "dmd2-outputs"
    keep_outputs_s: float = 3600.0
    queue_timeout_s: float = 300.0
    run_timeout_s: float = 600.0
    safety: SafetyMode = "withhold"
    log_prompts: bool = False
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        longest = self.queue_timeout_s + self.run_timeout_s + HANDING_OVER_S
        if self.keep_outputs_s < longest:
            raise DMD2Error(
                f"DMD2_KEEP_OUTPUTS_S={self.keep_outputs_s:g} is less than the {longest:g} s that "
                "a request may be under way (DMD2_QUEUE_TIMEOUT_S + DMD2_RUN_TIMEOUT_S + "
                f"{HANDING_OVER_S:g}), so that its images could be deleted too early"
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings that environ asks for.

        Raises:
            DMD2Error: DMD2_MODEL is missing, or a variable holds what it may not.
        """
        if not environ.get("DMD2_MODEL"):
            raise DMD2Error(
                "DMD2_MODEL is not set: name an entry of weights/manifest.json "
                "(such as sdxl-4step) or give the path of a model folder"
            )
        return cls(
            model=environ["DMD2_MODEL"],
            device=_choice(environ, "DMD2_DEVICE", DEVICES),
            dtype=_choice(environ, "DMD2_DTYPE", DTYPES),
            memory=_choice(environ, "DMD2_MEMORY", MEMORY_MODES),
            max_batch=_max_batch(environ.get("DMD2_MAX_BATCH", "auto")),
            compile=_choice(environ, "DMD2_COMPILE", ("0", "1")) == "1",
            download=_choice(environ, "DMD2_DOWNLOAD", ("0", "1")) == "1",
            lora_scale=_scale(environ.get("DMD2_LORA_SCALE", "1.0")),
            weights_dir=Path(environ.get("DMD2_WEIGHTS_DIR", cls.weights_dir)),
            output_dir=Path(environ.get("DMD2_OUTPUT_DIR", cls.output_dir)),
            keep_outputs_s=_seconds(environ, "DMD2_KEEP_OUTPUTS_S", cls.keep_outputs_s),
            queue_timeout_s=_seconds(environ, "DMD2_QUEUE_TIMEOUT_S", cls.queue_timeout_s),
            run_timeout_s=_seconds(environ, "DMD2_RUN_TIMEOUT_S", cls.run_timeout_s),
            safety=_choice(environ, "DMD2_SAFETY", SAFETY_MODES),
            log_prompts=_choice(environ, "DMD2_LOG_PROMPTS", ("0", "1")) == "1",
            log_format=_choice(environ, "DMD2_LOG_FORMAT", LOG_FORMATS),
        )


def _choice(environ: Mapping[str, str], name: str, choices: tuple[Choice, ...]) -> Choice:
    """What a variable holds; the first of the choices where it is not set."""
    value = environ.get(name, choices[0])
    for choice in choices:
        if value == choice:
            return choice
    raise DMD2Error(f"{name}={value!r} is not one of {', '.join(choices)}")


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, f"{default:g}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SECONDS:
        raise DMD2Error(
            f"{name}={text!r} is not a number of seconds above 0, at most {MAX_SECONDS}"
        )
    return value


def _max_batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_BATCH:
        raise DMD2Error(
            f"DMD2_MAX_BATCH={text!r} is neither auto nor a number from 1 to {MAX_BATCH}"
        )
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= MAX_LORA_SCALE:
        raise DMD2Error(
            f"DMD2_LORA_SCALE={text!r} is not a number above 0 and at most {MAX_LORA_SCALE:g}"
        )
    return value
