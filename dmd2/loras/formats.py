"""LoRA files of every format to what they add to each parameter; each key counts exactly once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmd2.errors import LoraError
from dmd2.loras.delta import PRODUCTS, Deltas, Parts, WeightDelta, rank_of
from dmd2.loras.header import shown
from dmd2.loras.lora_file import read_tensors
from dmd2.loras.names import MODEL_PARTS, ModuleNames

_HADA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
# A key's end, and the part of its module that it is.
_SUFFIXES = {
    # kohya, LyCORIS
    **{f".lora_{part}.weight": part for part in ("down", "up", "mid")},
    **{f".hada_{part}": f"hada_{part}" for part in _HADA},
    **{f".lokr_{part}": f"lokr_{part}" for part in _LOKR},
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "bias",
    ".b_norm": "bias",
    # peft
    **{f".lora_A{adapter}.weight": "down" for adapter in ("", ".default")},
    **{f".lora_B{adapter}.weight": "up" for adapter in ("", ".default")},
    **{f".lora_magnitude_vector{end}": "peft_magnitude" for end in ("", ".weight")},
    # diffusers before 0.26
    **{f".lora.{part}.weight": part for part in ("down", "up")},
    **{f"_lora.{part}.weight": part for part in ("down", "up")},
    **{f".lora_linear_layer.{part}.weight": part for part in ("down", "up")},
}
# What an unknown key says of its file.
_OTHERS = (
    (r"\.oft_", "OFT and BOFT, which turn weights, are not supported"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA is not supported"),
    (r"\.on_input$|\.ia3_l$", "(IA)^3, which scales weights, is not supported"),
    (r"^bundle_emb", "embeddings bundled with a LoRA are not supported"),
    (r"^(emb_params|clip_[gl]|string_to_param|<.+>)$", "it is a textual inversion, not a LoRA"),
    (
        r"(double|single|joint)_blocks|single_transformer|^(lora_)?transformer[._]"
        r"|diffusion_model[._](layers|blocks)[._]",
        "it was made for Flux, SD3 or another transformer",
    ),
    (
        r"^lora_te_|down_blocks[._]0[._]att|up_blocks[._]3",
        "it was made for Stable Diffusion 1 or 2",
    ),
    (r"^(model|first_stage_model|conditioner)\.", "it is a whole checkpoint, not a LoRA"),
)
_TAKE_ANOTHER = "Take a LoRA that was made for SDXL"
_CONFIG = "lora_adapter_metadata"
_NUM_TRIGGERS = 5


@dataclass(frozen=True)
class Lora:
    """A LoRA file, ready to be added to a model's weights.

    Attributes:
        deltas: per model part ("unet", "text_encoder", "text_encoder_2") and parameter what is
            added to it.
        about: for log lines, printable and short: "ranks", and as far as the file's header says so
            "network" (what trained it), "base" (on which model) and "triggers" (the words that
            call for it).
    """

    deltas: Mapping[str, Deltas]
    about: Mapping[str, str]


@dataclass(frozen=True)
class _Module:
    """One module of the file: how its keys spell it, which it is, and its tensors by part."""

    spelling: str
    model_part: str
    name: str
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Adapter:
    """What peft's LoraConfig says of the alphas of modules that have no key for it."""

    alpha: float | None
    alphas: Mapping[str, float]
    by_root_of_rank: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], prefix: str) -> _Adapter:
        alpha, patterns = (config.get(prefix + key) for key in ("lora_alpha", "alpha_pattern"))
        alphas = {_plain(key): float(own) for key, own in (patterns or {}).items()}
        by_root_of_rank = bool(config.get(f"{prefix}use_rslora"))
        return cls(None if alpha is None else float(alpha), alphas, by_root_of_rank)

    def factor(self, module: str, rank: int) -> float:
        """The most exact of the names that end as the module's, else what all have."""
        names = module.split(".")
        ends = (".".join(names[start:]) for start in range(len(names)))
        alpha = next((self.alphas[end] for end in ends if end in self.alphas), self.alpha)
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.by_root_of_rank else rank)


def read_lora(path: Path, names: ModuleNames, sha256: str | None = None) -> Lora:
    """Read a LoRA for the model that names are of, and only with that sha256 if one is given.

    Raises:
        LoraError: read_tensors or parse_lora refuses it.
        OSError: it cannot be read.
    """
    return parse_lora(*read_tensors(path, sha256), names)


def parse_lora(tensors: Parts, metadata: Mapping[str, str], names: ModuleNames) -> Lora:
    """What a LoRA file's tensors add to the model that names are of.

    A module's factor is alpha / rank. Its alpha is its key's, else the adapter's in diffusers'
    header, else the rank.

    Raises:
        LoraError: a key is unknown (the first three are named), a module stands twice, lacks a
            part or does not fit its parameter, or an alpha is no number.
    """
    adapters = _adapters(metadata)
    deltas: dict[str, dict[str, WeightDelta]] = {}
    for module in _modules(tensors, names):
        found = deltas.setdefault(module.model_part, {})
        for parameter, delta in _deltas(module, adapters).items():
            shape = names.shapes[module.model_part].get(parameter)
            if shape is None or not delta.fits(shape):
                raise _misfit(module, parameter, shape)
            found[parameter] = delta
    return Lora(deltas, _about(deltas, metadata))


def _modules(tensors: Parts, names: ModuleNames) -> list[_Module]:
    modules: dict[tuple[str, str], _Module] = {}
    unknown = []
    for key, tensor in tensors.items():
        spelling, part = _split(key)
        target = names.find(spelling)
        if part is None or target is None:
            unknown.append(key)
            continue
        if part == "peft_magnitude":  # [out], or [1, out, 1, 1] for a convolution
            part, tensor = "magnitude", tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1))
        module = modules.setdefault(target, _Module(spelling, *target, {}))
        if module.spelling != spelling or part in module.tensors:
            raise LoraError(
                f"{target[1]} stands in it twice, as {shown(module.spelling)} and as {shown(key)}",
                "Take another file; which of the two is meant, nobody knows",
            )
        module.tensors[part] = tensor
    if unknown:
        raise _unknown(unknown)
    return list(modules.values())


def _split(key: str) -> tuple[str, str | None]:
    """What stands before a key's suffix, and the part that the suffix means."""
    ends = ((key.removesuffix(s), part) for s, part in _SUFFIXES.items() if key.endswith(s))
    return next(ends, (key, None))


def _unknown(keys: list[str]) -> LoraError:
    why = (why for pattern, why in _OTHERS if any(re.search(pattern, key[:500]) for key in keys))
    reason = next(why, "they belong to no module of SDXL or to no known format")
    first = ", ".join(map(shown, sorted(keys)[:3]))
    return LoraError(f"it has {len(keys)} unknown keys ({first}): {reason}", _TAKE_ANOTHER)


def _deltas(module: _Module, adapters: Mapping[str, _Adapter]) -> dict[str, WeightDelta]:
    """What a module adds to its weight, its bias or both."""
    parts = dict(module.tensors)
    bias, alpha, magnitude = (parts.pop(part, None) for part in ("bias", "alpha", "magnitude"))
    is_plain = alpha is None and magnitude is None
    found = {} if bias is None else {f"{module.name}.bias": WeightDelta({"diff": bias})}
    if found and not parts and is_plain:
        return found
    if frozenset(parts) not in PRODUCTS or ("diff" in parts and not is_plain):
        raise LoraError(
            f"{shown(module.spelling)} has {', '.join(sorted(module.tensors))}, which are not the "
            "parts of a module in any format",
            "Take another file: this one is incomplete",
        )
    rank = rank_of(parts)
    factor = 1.0 if rank is None else _factor(module, alpha, rank, adapters)
    return {**found, f"{module.name}.weight": WeightDelta(parts, factor, magnitude)}


def _factor(
    module: _Module, alpha: torch.Tensor | None, rank: int, adapters: Mapping[str, _Adapter]
) -> float:
    if alpha is None:
        return adapters[module.model_part].factor(module.name, rank)
    if alpha.numel() != 1 or alpha == 0:  # trainers read 0 as the rank, and others as nothing
        raise LoraError(f"{shown(module.spelling)}.alpha is 0 or no number", _TAKE_ANOTHER)
    return alpha.item() / rank


def _adapters(metadata: Mapping[str, str]) -> dict[str, _Adapter]:
    """The config of each model part's adapter, as diffusers writes it into the header."""
    try:
        config = json.loads(metadata.get(_CONFIG, "{}"))
        if not any(key.startswith(MODEL_PARTS) for key in config):  # of a UNet alone
            config = {f"unet.{key}": value for key, value in config.items()}
        return {part: _Adapter.of(config, f"{part}.") for part in MODEL_PARTS}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{_CONFIG} in its header cannot be read", _TAKE_ANOTHER) from error


def _plain(pattern: str) -> str:
    """A module's name from what peft takes for a regular expression; no file may bring others."""
    name = pattern.removeprefix("^").removeprefix("text_model.")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(pattern)
    return name


def _misfit(module: _Module, parameter: str, shape: torch.Size | None) -> LoraError:
    sizes = ", ".join(f"{part} {list(t.shape)}" for part, t in sorted(module.tensors.items()))
    there = "the model does not have" if shape is None else f"has the shape {list(shape)}"
    return LoraError(
        f"{shown(module.spelling)} has {sizes}, and {parameter} {there}: it was made for another "
        "model, such as Stable Diffusion 1 or 2, or is broken",
        _TAKE_ANOTHER,
    )


def _about(deltas: Mapping[str, Deltas], metadata: Mapping[str, str]) -> dict[str, str]:
    ranks = {rank_of(delta.parts) or 0 for each in deltas.values() for delta in each.values()}
    said = {
        "ranks": ", ".join(str(rank) for rank in sorted(ranks) if rank),
        "network": metadata.get("ss_network_module", ""),
        "base": metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version", ""),
        "triggers": metadata.get("modelspec.trigger_phrase") or _frequent_tags(metadata),
    }
    printable = {key: "".join(filter(str.isprintable, text))[:200] for key, text in said.items()}
    return {key: text for key, text in printable.items() if text}


def _frequent_tags(metadata: Mapping[str, str]) -> str:
    """The most frequent tags of the training's captions, which kohya counts by folder."""
    counts: Counter[str] = Counter()
    try:
        for folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({tag.strip(): int(count) for tag, count in folder.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""
    return ", ".join(tag for tag, _ in counts.most_common(_NUM_TRIGGERS))
