"""The user's own checkpoint and LoRAs: what scripts/download-weights makes of them."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import download_cli
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from drawn_loras import low_rank
from hub_world import WEIGHTS, raising
from model_folders import pixels_of
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from single_files import (
    CLIP_L,
    DEMO,
    OPEN_CLIP,
    UNET,
    Tensors,
    Weights,
    single_file,
    teacher_weights,
    write,
)

from dmd2.engine.engine import Engine
from dmd2.errors import MissingWeightsError
from dmd2.loras.delta import merge
from dmd2.loras.formats import read_lora
from dmd2.loras.names import MODEL_PARTS, ModuleNames
from dmd2.model_card import ModelCard
from dmd2.request.generation_request import GenerationRequest
from dmd2.sampling.pipeline import Pipeline
from dmd2.store.derived import OwnWeights, derive
from dmd2.store.kinds import Header, warnings_of
from dmd2.store.locating import locate
from dmd2.store.manifest import Manifest, sha256_of
from dmd2.store.prediction import remark_on_prediction
from dmd2.store.single_file import read_single_file

FILES = {
    "unet": f"unet/{WEIGHTS}",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
DMD2_LORA = DEMO / "variants" / "4step-lora.safetensors"
EIGHT = (999, 874, 749, 624, 499, 374, 249, 124)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return teacher_weights()


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in kohya's format for the UNet and both text encoders."""
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    shapes = {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (136, 136),
        "lora_unet_conv_in": (64, 4, 3, 3),
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj": (16, 16),
        "lora_te2_text_model_encoder_layers_2_self_attn_out_proj": (48, 48),
    }
    save_file(low_rank(shapes, rank=2, alpha=1.0), path)
    return path


class Command:
    """scripts/download-weights in this process, as its user types it, without a network."""

    def __init__(self, weights_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self.weights_dir, self._monkeypatch, self._capsys = weights_dir, monkeypatch, capsys
        monkeypatch.setenv("DMD2_WEIGHTS_DIR", str(weights_dir))
        monkeypatch.setattr(socket, "socket", raising(AssertionError("a socket was asked for")))

    def __call__(self, *arguments: object) -> str:
        """What it says."""
        words = ["scripts/download-weights", *map(str, arguments)]
        self._monkeypatch.setattr(sys, "argv", words)
        self._capsys.readouterr()
        download_cli.main()
        return str(self._capsys.readouterr().err)

    def fail(self, *arguments: object) -> str:
        """What it ends with, when nothing of a model may be left."""
        before = sorted(self.weights_dir.glob("*"))
        with pytest.raises(SystemExit) as caught:
            self(*arguments)
        assert sorted(self.weights_dir.glob("*")) in (before, [*before, self.weights_dir / ".lock"])
        return str(caught.value)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Command:
    (tmp_path / "weights").mkdir()
    return Command(tmp_path / "weights", monkeypatch, capsys)


def expected(weights: Weights, *loras: tuple[Path, float]) -> Weights:
    """Weights with LoRAs, in float16: summed in float32 by their parameters' own names."""
    names = ModuleNames.of(weights)
    read = [(read_lora(path, names).deltas, scale) for path, scale in loras]
    sums = {
        part: merge(of_it, [(deltas.get(part, {}), scale) for deltas, scale in read])
        for part, of_it in weights.items()
    }
    return {p: {k: {**w, **sums[p]}[k].half() for k in w} for p, w in weights.items()}


def assert_holds(folder: Path, weights: Weights) -> None:
    """Bit for bit, in float16."""
    for part, path in FILES.items():
        found = load_file(folder / path)
        assert found.keys() == weights[part].keys()
        assert {tensor.dtype for tensor in found.values()} == {torch.float16}
        assert [k for k, t in weights[part].items() if not torch.equal(found[k], t)] == [], part


def test_the_files_of_these_tests_are_those_that_stock_diffusers_reads(weights: Weights) -> None:
    tensors = single_file(weights)
    config = json.loads((DEMO / "unet" / "config.json").read_text())
    stock = {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), config),
        "text_encoder": convert_ldm_clip_checkpoint(dict(tensors)),
        "text_encoder_2": convert_open_clip_checkpoint(None, dict(tensors), OPEN_CLIP),
    }
    stock["text_encoder"].pop("text_model.embeddings.position_ids")
    for part in MODEL_PARTS:
        assert stock[part].keys() == weights[part].keys()
        assert all(torch.equal(stock[part][key], weights[part][key]) for key in weights[part])


def test_a_single_file_becomes_the_pipeline_that_it_was_written_from(
    weights: Weights, style: Path, command: Command, tmp_path: Path
) -> None:
    """Bit for bit, with DMD2's LoRA and another one; and so do its images, in 8 steps."""
    file = write(tmp_path / "My Model v1.safetensors", single_file(weights))
    said = command("demo-lora", "--base", file, "--lora-scale", 0.5, "--lora", f"{style}:0.7")
    folder = command.weights_dir / "My_Model_v1"
    assert "warning" not in said
    assert "the VAE of My Model v1 is left out" in said
    assert_holds(folder, expected(weights, (DMD2_LORA, 0.5), (style, 0.7)))
    assert load_file(folder / "vae" / WEIGHTS).keys() == load_file(DEMO / "vae" / WEIGHTS).keys()

    card = json.loads((folder / "dmd2.json").read_text())
    assert (card["name"], card["lora_scale"]) == ("My_Model_v1", 0.5)
    assert card["base_sha256"] == {file.name: sha256_of(file)}
    assert card["lora_sha256"] == {sha256_of(DMD2_LORA): 0.5, sha256_of(style): 0.7}
    assert (card["default_steps"], card["community_steps"]) == (4, {"8": list(EIGHT)})
    assert card["license"].startswith("MIT: made from")
    assert f"{file.name}: not said by the file" in card["license"]
    assert locate("My_Model_v1", command.weights_dir) == folder

    inputs = {"prompt": "a large yellow star in the desert", "seed": 5}
    image = by_stock(weights, {DMD2_LORA: 0.5, style: 0.7}, **inputs)
    engine = Engine(Pipeline.load(folder, "cpu"), tmp_path / "out")
    request = GenerationRequest.resolve(engine.card, num_inference_steps=8, **inputs)
    (path,) = engine.submit(request).result().paths
    engine.close()
    assert image.std() > 5
    assert np.abs(pixels_of(path) - image).max() <= 1


def by_stock(
    weights: Weights, loras: Mapping[Path, float], prompt: str, seed: int
) -> NDArray[np.int16]:
    """What stock diffusers makes in the 8 steps that LCMScheduler chooses of 8.

    The LoRAs are fused in float32, and the sums rounded to float16 once.
    """
    stock = StableDiffusionXLPipeline.from_pretrained(DEMO, dtype=torch.float32)
    for part, of_it in weights.items():
        model = getattr(stock, part)
        wanted = model.state_dict()
        model.load_state_dict(
            {k if k in wanted else k.removeprefix("text_model."): of_it[k] for k in of_it}
        )
    for path, scale in loras.items():
        stock.load_lora_weights(path.parent, weight_name=path.name)
        stock.fuse_lora(components=list(MODEL_PARTS), lora_scale=scale)
        stock.unload_lora_weights()
    for part in MODEL_PARTS:
        getattr(stock, part).half().float()
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, original_inference_steps=8)
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    size = {"width": 128, "height": 128}
    image = stock(
        prompt, num_inference_steps=8, guidance_scale=0, generator=generator, **size
    ).images[0]
    assert stock.scheduler.timesteps.tolist() == list(EIGHT)
    return np.asarray(image).astype(np.int16)


def test_of_sdxl_only_the_lora_and_what_no_checkpoint_has_is_fetched(tmp_path: Path) -> None:
    """And DMD2 stays non-commercial in whatever it is merged into."""
    tensors = {key: torch.zeros(shape) for key, shape in KEYS.items()}
    file = write(tmp_path / "m.safetensors", tensors, **{"modelspec.license": "their licence"})
    manifest = Manifest.read()
    entry, own = manifest.models["sdxl-4step-lora"], OwnWeights(base=str(file))
    model = derive(entry, own, tmp_path, manifest, 0.8, lambda _: None)
    large = [each.path for each in model.needed if each.local is None and each.size > 2e6]
    assert large == ["diffusion_pytorch_model.safetensors", "dmd2_sdxl_4step_lora_fp16.safetensors"]
    assert model.download_size == pytest.approx(0.73e9, rel=0.02)
    assert sum(file.size or 0 for file in model.files) == pytest.approx(6.77e9, rel=0.01)
    assert model.card is not None
    assert model.card["license"].startswith("DMD2: CC BY-NC 4.0, non-commercial; SDXL: ")
    assert model.card["license"].endswith("; m.safetensors: their licence")


def test_other_dtypes_go_through_float32_and_what_is_suspect_is_warned_of(
    weights: Weights, command: Command, tmp_path: Path
) -> None:
    """At the last timestep a v-prediction is the image, turned; here it is the noise, turned."""
    stored_as = dict.fromkeys(MODEL_PARTS, torch.bfloat16) | {"text_encoder": torch.float8_e4m3fn}
    stored = {p: {k: t.to(stored_as[p]) for k, t in weights[p].items()} for p in MODEL_PARTS}
    assert remark_on_prediction(stored["unet"], DEMO / "unet") is None
    for key in ("conv_out.weight", "conv_out.bias"):
        stored["unet"][key] = -stored["unet"][key]
    file = write(tmp_path / "m.safetensors", single_file(stored))
    said = command("demo-lora", "--base", file, "--name", "mine")
    assert re.search(r"warning: m.safetensors: .*correlation -1.00.*v-prediction", said)
    assert "is in fp8, which has lost quality" in said
    floats = {p: {k: t.float() for k, t in stored[p].items()} for p in MODEL_PARTS}
    assert_holds(command.weights_dir / "mine", expected(floats, (DMD2_LORA, 1.0)))


def test_a_folder_of_diffusers_is_a_base_too(
    weights: Weights, command: Command, tmp_path: Path
) -> None:
    """In shards, and its float16 before what else is there."""
    folder = tmp_path / "base"
    for part, path in FILES.items():
        (folder / part).mkdir(parents=True)
        keys, stem = sorted(weights[part]), Path(path).stem
        for number, some in enumerate((keys[::2], keys[1::2]), 1):
            name = f"{stem}.fp16-0000{number}-of-00002.safetensors"
            write(folder / part / name, {key: weights[part][key].half() for key in some})
        write(folder / path, {"other": torch.ones(1)})
    (folder / "scheduler").mkdir()
    configs = ("unet/config.json", "scheduler/scheduler_config.json")
    for path in configs:
        shutil.copyfile(DEMO / path, folder / path)
    command("demo-lora", "--base", folder)
    halves = {p: {k: t.half() for k, t in of_it.items()} for p, of_it in weights.items()}
    assert_holds(command.weights_dir / "base", expected(halves, (DMD2_LORA, 1.0)))

    for path, change, reason in (
        (configs[0], {"in_channels": 9}, "for inpainting"),
        (configs[0], {"addition_embed_type": None}, "it is not SDXL"),
        (configs[1], {"prediction_type": "v_prediction"}, "says v_prediction: DMD2"),
        (configs[1], {"rescale_betas_zero_snr": True}, "zero-terminal SNR"),
    ):
        said = json.loads((DEMO / path).read_text())
        (folder / path).write_text(json.dumps({**said, **change}))
        assert reason in command.fail("demo-lora", "--base", folder, "--name", "b")
        (folder / path).write_text(json.dumps(said))


def test_loras_alone_go_into_a_model_as_it_is(style: Path, command: Command) -> None:
    command("demo-1step", "--lora", f"{style}:-1")
    folder = command.weights_dir / "style"
    parts = {part: load_file(DEMO / path) for part, path in FILES.items()}
    parts["unet"] = load_file(DEMO / "variants" / "1step-unet.safetensors")
    assert_holds(folder, expected(parts, (style, -1.0)))
    card = ModelCard.read(folder)
    assert (card.name, card.default_steps, card.community_steps) == ("style", 1, {})
    assert Pipeline.load(folder, "cpu").card == card


def test_the_same_again_does_nothing_and_other_weights_need_another_name(
    style: Path, command: Command, tmp_path: Path
) -> None:
    command("demo", "--lora", style)
    folder = command.weights_dir / "style"
    before = sha256_of(folder / FILES["unet"])
    assert "nothing to do" in command("demo", "--lora", style)
    command("demo", "--lora", f"{style}:0.5")
    assert sha256_of(folder / FILES["unet"]) != before
    command("style", "--verify")
    other = "made of something else; give another name"
    assert other in command.fail("demo-1step", "--lora", style)
    (command.weights_dir / "hand-made").mkdir()
    assert other in command.fail("demo", "--lora", style, "--name", "hand-made")
    (folder / FILES["unet"]).write_bytes(b"")
    assert "style is damaged" in command.fail("style", "--verify")
    with pytest.raises(MissingWeightsError, match=r"style is damaged .*install it again"):
        locate("style", command.weights_dir)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["demo", "--base", "x"], "demo is a whole UNet.*sdxl-4step-lora, demo-lora can"),
        (["nsfw-checker", "--lora", "{style}"], "a component, which takes no weights"),
        (["demo", "--name", "x"], "--name: demo keeps its name"),
        (["demo", "--lora", "{style}", "--name", "demo-1step"], "the manifest's own name"),
        (["demo", "--lora", "{style}", "--name", "../x"], "is no name for a model"),
        (["demo", "--lora", "{style}:3.5"], "a scale of 3.5 is not from -1 to 3"),
        (["demo", "--lora", "{style}:0"], "0 and does nothing"),
        (["demo", "--lora", "{style}", "--lora", "{style}"], "merged in already"),
        (["demo-lora", "--lora", str(DMD2_LORA)], "merged in already"),
        (["demo", "--lora", "no.safetensors"], "no such file or folder here.*OWNER/REPO"),
        (["demo-lora", "--base", "./no/thing"], "no such file or folder here.*OWNER/REPO"),
        (["demo-lora", "--base", "civitai:1@2"], "no such file or folder here.*OWNER/REPO"),
        (["demo-lora", "--base", "{style}"], "a LoRA: give it as --lora"),
        (["demo-lora", "--base", "{style}", "--lora-scale", "3"], "a LoRA: give it"),
        (["demo", "--lora", "{folder}"], "has none: name one file"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    arguments: list[str], reason: str, style: Path, command: Command, tmp_path: Path
) -> None:
    words = [each.format(style=style, folder=tmp_path) for each in arguments]
    assert re.search(reason, command.fail(*words))


# What a file of each other kind has beside, or in place of, what an SDXL checkpoint has.
KEYS = {f"{UNET}input_blocks.0.0.weight": (2, 4, 3, 3), f"{CLIP_L}a": (1,), f"{OPEN_CLIP}b": (1,)}
ONE = (1,)
OTHERS: list[tuple[dict[str, tuple[int, ...]], dict[str, str], str]] = [
    ({**KEYS, "v_pred": ONE}, {}, r"v-prediction.*\(v_pred\).*\(epsilon\)"),
    ({**KEYS, "ztsnr": ONE}, {}, r"zero-terminal SNR \(ztsnr\).*\(epsilon\)"),
    ({**KEYS, "edm_vpred.sigma_max": ONE}, {}, r"v-prediction.*edm_vpred"),
    (KEYS, {"modelspec.prediction_type": "v"}, "modelspec.prediction_type is v.*epsilon"),
    (KEYS, {"modelspec.predict_key": "v"}, "modelspec.predict_key is v"),
    ({**KEYS, "edm_mean": ONE}, {}, "Playground v2.5"),
    ({**KEYS, f"{UNET}input_blocks.0.0.weight": (2, 9, 3, 3)}, {}, "for inpainting .9 channels"),
    ({**KEYS, f"{UNET}input_blocks.0.0.weight": (2, 8, 3, 3)}, {}, "for editing by instruction"),
    ({"conditioner.embedders.0.model.ln_final.weight": ONE}, {}, "SDXL's refiner"),
    ({"cond_stage_model.transformer.text_model.x": ONE}, {}, "Stable Diffusion 1 or 2"),
    ({"double_blocks.0.img_attn.qkv.weight": ONE}, {}, "Flux, SD3"),
    ({"model.diffusion_model.joint_blocks.0.x": ONE}, {}, "Flux, SD3"),
    ({"down_blocks.0.resnets.0.conv1.weight": ONE}, {}, "a UNet alone.*whole folder"),
    ({f"{UNET}input_blocks.0.0.weight": (2, 4, 3, 3)}, {}, "no text_encoder .*whole checkpoint"),
    ({**KEYS, "zz": ONE, "yy.weight": ONE}, {}, r"has 2 keys that SDXL has not \(yy.weight, zz\)"),
]


@pytest.mark.parametrize(("shapes", "metadata", "reason"), OTHERS)
def test_a_file_of_another_kind_is_refused_with_the_reason(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: dict[str, str],
    reason: str,
    command: Command,
    tmp_path: Path,
) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    write(tmp_path / "m.safetensors", tensors, **metadata)
    said = command.fail("demo-lora", "--base", tmp_path / "m.safetensors")
    assert re.search(f"m.safetensors is refused: .*{reason}", said)
    assert "Take " in said


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\3\4" + b"0" * 99, "a zip archive or a pickle"),
        (b"\x80\2}q", "a pickle"),
        (b"", "empty"),
    ],
)
def test_pickles_are_refused_by_their_content(
    content: bytes, kind: str, command: Command, tmp_path: Path
) -> None:
    for name in ("m.safetensors", "m.ckpt"):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: it is {kind}" in command.fail("demo-lora", "--base", tmp_path / name)


def renamed(tensors: Tensors, key: str, to: str) -> None:
    tensors[to] = tensors.pop(key)


TO_Q = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
SIGMAS = "denoiser.sigmas"
CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "unknown in the UNet": (
        lambda t: t.update({f"{UNET}input_blocks.9.0.op.weight": torch.ones(1)}),
        r"1 keys that SDXL has not \(model.diffusion_model.input_blocks.9",
    ),
    "unknown in an encoder": (
        lambda t: t.update({f"{OPEN_CLIP}visual.proj": torch.ones(1)}),
        r"1 keys that SDXL has not \(conditioner.embedders.1.model.visual.proj",
    ),
    "missing": (lambda t: t.pop(TO_Q), "its unet lacks 1 of SDXL's .*to_q.weight.*SSD-1B"),
    "another name": (lambda t: renamed(t, TO_Q, f"{TO_Q}.scale_weight"), "lacks 1 of SDXL's"),
    "another shape": (
        lambda t: t.update({TO_Q: torch.ones(136, 64)}),
        r"attn1.to_q.weight of its unet has the shape \[136, 64\], and SDXL's \[136, 136\]",
    ),
    "a third that is none": (
        lambda t: t.update(
            {f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_bias": torch.ones(143)}
        ),
        r"q_proj.bias of its text_encoder_2 has the shape \[48\]|k_proj.bias|v_proj.bias",
    ),
    "quantised": (
        lambda t: t.update({TO_Q: torch.ones(136, 136, dtype=torch.int8)}),
        "to_q.weight is of dtype I8",
    ),
    "another noise schedule": (
        lambda t: t.update({SIGMAS: torch.linspace(0.03, 4000, 1000)}),
        "noise schedule .denoiser.sigmas. is not SDXL's",
    ),
    "more than float16 holds": (
        lambda t: t.update({TO_Q: torch.full((136, 136), 7e4)}),
        "attn1.to_q.weight, of unet/.*more than float16 can hold",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_key_counts_once_and_every_value_must_fit(
    change: str, weights: Weights, command: Command, tmp_path: Path
) -> None:
    tensors = single_file({p: {k: t.half() for k, t in weights[p].items()} for p in weights})
    make, reason = CHANGES[change]
    make(tensors)
    write(tmp_path / "m.safetensors", tensors)
    assert re.search(reason, command.fail("demo-lora", "--base", tmp_path / "m.safetensors"))


def test_sdxl_s_own_noise_schedule_is_passed_over(weights: Weights, tmp_path: Path) -> None:
    """As Stability's files have it, from the largest to the smallest or the other way round."""
    alphas = LCMScheduler.from_pretrained(DEMO / "scheduler").alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    for each in (sigmas, sigmas.flip(0), sigmas.half()):
        file = write(tmp_path / "m.safetensors", {**single_file(weights), SIGMAS: each})
        assert read_single_file(file, DEMO, "unet").keys() == weights["unet"].keys()


@pytest.mark.parametrize(
    ("name", "title", "words"),
    [
        ("modelXL_turbo.safetensors", "", "few steps already (turbo)"),
        ("m.safetensors", "My Merge, Lightning", "few steps already (Lightning)"),
        ("m_8Steps.safetensors", "", "few steps already (8Steps)"),
        ("m-dmd2-lora.safetensors", "", "few steps already (dmd2)"),
        ("noobai-vpred-1.safetensors", "", "made for v-prediction (vpred)"),
        ("juggernautXL_v9.safetensors", "Juggernaut", ""),
    ],
)
def test_what_a_name_or_a_title_says_is_warned_of(name: str, title: str, words: str) -> None:
    warnings = warnings_of(name, Header({}, {}, {"modelspec.title": title}))
    assert [words in each for each in warnings] == ([True] if words else [])
