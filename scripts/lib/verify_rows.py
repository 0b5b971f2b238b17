"""The rows of scripts/verify's report: what is measured, and what it has to be."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from verify_pictures import (
    DEMO_PROMPTS,
    PROMPTS,
    Pictures,
    by_stock,
    by_us,
    largest,
    made_by,
    psnr,
    requests_of,
    with_engine,
)
from verify_report import Report, Row

from dmd2.engine.engine import Engine
from dmd2.engine.job import GenerationResult
from dmd2.errors import MissingWeightsError
from dmd2.fast.ways import PLAIN, WAYS, Facts
from dmd2.model_card import ModelCard
from dmd2.models.loading import choose_device, is_low
from dmd2.request.generation_request import GenerationRequest
from dmd2.settings import Settings
from dmd2.store.locating import locate_safety_checker
from dmd2.store.manifest import RECORD_FILE, Manifest, verify
from dmd2.store.provision import is_shipped, provided

# In the order that they are compared in.
PRECISIONS = ("float32", "float16", "bfloat16")
# In float32 nothing but the order of sums differs: a pixel is off by one here and there, and all of
# them off by one would be 48 dB.
FLOAT32_DB = 50.0
# In half precision stock diffusers is off from its own float32 too, by how much depends on the
# model; we may be no further off than that, but for what two such errors differ by chance.
ALLOWED_DB = 3.0
# Where there is no memory for float32, all that is left to compare with is stock diffusers in the
# same precision, which is as far off in other directions. Not settled by a measurement yet.
SAME_PRECISION_DB = {"float16": 30.0, "bfloat16": 20.0}
# At 1024x1024, in 4 steps, on an H200: one image to its file, and images a second.
GOALS = {"latency_ms": 140.0, "images_per_s": 10.5}
_NOT_COMPARED = (
    "none was compared, since stock diffusers ran out of memory: end what else uses the device, "
    "take --precisions float16, or compare on the CPU by DMD2_DEVICE=cpu"
)
_AT_ONCE = 16
_TOO_LONG_S = 20.0


def verify_model(settings: Settings, report: Report, precisions: Sequence[str] | None) -> None:
    """Add every row of a model; without whole files none but the first.

    Args:
        settings: of a server; dtype is that of the row "speed".
        report: gets the rows.
        precisions: torch's names; None for all that this device is quick at.

    Raises:
        DMD2Error: the model, or the device, cannot be used as asked.
    """
    manifest = Manifest.read()
    with (
        provided(settings.model, settings.weights_dir, manifest) as folder,
        tempfile.TemporaryDirectory() as outputs,
    ):
        hashes = report.measure("hashes", lambda: check_hashes(settings.model, folder, manifest))
        if hashes["passed"] is False:
            return
        card = ModelCard.read(folder)
        known = DEMO_PROMPTS if is_shipped(settings.model, manifest) else PROMPTS
        requests = requests_of(card, known)
        settings = replace(settings, model=str(folder), output_dir=Path(outputs), safety="off")
        if precisions is None:
            is_cuda = choose_device(settings.device).type == "cuda"
            precisions = PRECISIONS if is_cuda else PRECISIONS[:1]
        with without_tf32():
            compare_all(settings, folder, requests, report, precisions)
        report.measure("safety checker", lambda: check_safety(settings, card, requests))
        report.measure("speed", lambda: measure_speed(settings, requests))


def check_hashes(model: str, folder: Path, manifest: Manifest) -> Row:
    """Whether each file is the one that it is to be; of a folder of the user's own nobody knows."""
    if model not in manifest.models and not (folder / RECORD_FILE).is_file():
        return {"passed": None, "problems": ["a folder that the manifest does not know"]}
    problems = verify(manifest.models.get(model), folder)
    return {"passed": not problems, "problems": problems}


@contextmanager
def without_tf32() -> Iterator[None]:
    """TF32, which torch allows in convolutions, has eleven bits: no float32 to compare with."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = before


def compare_all(
    settings: Settings,
    folder: Path,
    requests: Sequence[GenerationRequest],
    report: Report,
    precisions: Sequence[str],
) -> None:
    """A row for stock diffusers in each precision, and for each way of ours beside it.

    Where stock diffusers fits into memory in no precision, none of our pictures was compared, which
    fails.
    """
    device = str(choose_device(settings.device))
    exact: list[Pictures] = []
    has_compared = False
    for precision in sorted(precisions, key=PRECISIONS.index):
        stock: list[Pictures] = []

        def run_stock(precision: str = precision, stock: list[Pictures] = stock) -> Row:
            stock.append(by_stock(folder, device, precision, requests))
            if precision == "float32":
                exact.extend(stock)
            return {"passed": None, **distances(stock[0], exact)}

        report.measure(f"stock, {precision}", run_stock)
        if stock:
            has_compared = True
            for name, ours in ways(replace(settings, dtype=precision, max_batch=1)).items():
                run_ours = partial(compare, ours, requests, stock[0], exact)
                report.measure(f"ours {name}, {precision}", run_ours, must_fit=True)
    if not has_compared:
        report.add({"row": "pictures", "passed": False, "error": _NOT_COMPARED})


def ways(settings: Settings) -> Mapping[str, Settings]:
    """Each way to serve, by the settings that choose it.

    Plain; the first that can be built here; where those are CUDA graphs, which serve one image or
    two of the model's own size, also what serves all others; compiled, where that is asked for.
    """
    device = choose_device(settings.device)
    low_memory = is_low(settings.memory, device)
    facts = Facts(device, getattr(torch, settings.dtype), low_memory=low_memory)
    chosen = {
        "plain": replace(settings, tune="off", compile=False),
        "fast": replace(settings, tune="force", compile=False),
    }
    if any(way.keeps_memory and way.suits(facts) is None for way in WAYS):
        chosen["eager"] = replace(settings, tune="eager", compile=False)
    if settings.compile:
        chosen["compiled"] = replace(settings, tune="off")
    return chosen


def distances(pictures: Pictures, exact: Sequence[Pictures]) -> Row:
    """From stock diffusers' float32, where there was the memory for that."""
    if not exact:
        return {"psnr_db": None, "largest": None, "pictures": None}
    each = [psnr([one], [other]) for one, other in zip(pictures, exact[0], strict=True)]
    both = {"psnr_db": psnr(pictures, exact[0]), "largest": largest(pictures, exact[0])}
    return {**both, "pictures": each}


def compare(
    settings: Settings,
    requests: Sequence[GenerationRequest],
    stock: Pictures,
    exact: Sequence[Pictures],
) -> Row:
    """Our pictures against stock diffusers', and the bar that they have to reach.

    Where another way than plain is asked for, plain makes the same pictures, but it was not the one
    to be compared: a part of any picture that it made fails the row.
    """
    made = by_us(settings, requests)
    ours = made.pictures
    found, against = distances(ours, exact), "stock, float32"
    if settings.dtype == "float32":
        bar = FLOAT32_DB
    elif exact:
        bar = round(psnr(stock, exact[0]) - ALLOWED_DB, 2)
    else:
        bar, against = SAME_PRECISION_DB[settings.dtype], f"stock, {settings.dtype}"
        found = distances(ours, [stock])
    used = ways_of(made.results)
    row = {"passed": found["psnr_db"] >= bar, "bar_db": bar, "against": against, "ways": used}
    fell_back = [part for part, names in used.items() if PLAIN in names.split(", ")]
    if (settings.tune != "off" or settings.compile) and fell_back:
        row |= {"passed": False, "problem": f"fell back to plain: {', '.join(fell_back)}"}
    return {**row, **found}


def ways_of(results: Sequence[GenerationResult]) -> dict[str, str]:
    """For each part of the work every way that did it for any result, in the order of use."""
    used: dict[str, dict[str, None]] = {}
    for result in results:
        for part, names in result.ways.items():
            used.setdefault(part, {}).update(dict.fromkeys(names.split(", ")))
    return {part: ", ".join(names) for part, names in used.items()}


def check_safety(settings: Settings, card: ModelCard, requests: Sequence[GenerationRequest]) -> Row:
    """What the safety checker says of the pictures, where there is one."""
    try:
        if locate_safety_checker(card, settings.weights_dir) is None:
            return {"passed": None, "said": "this model needs none"}
    except MissingWeightsError as error:
        return {"passed": None, "said": str(error)}
    results = by_us(replace(settings, max_batch=1, safety="flag"), requests).results
    scores = [score for result in results for score in result.nsfw_scores]
    flagged = [i for i, result in enumerate(results) if result.flagged]
    return {"passed": None not in scores, "nsfw_scores": scores, "flagged": flagged}


def measure_speed(settings: Settings, requests: Sequence[GenerationRequest]) -> Row:
    """Of the engine with the settings that it was asked with, beside what an H200 is to reach."""

    def measure(engine: Engine) -> Row:
        seconds = [timed(partial(made_by, engine, [request])) for request in requests]
        latency_s = median(seconds)
        row: Row = {"passed": None, "latency_ms": round(1000 * latency_s, 1), "images_per_s": None}
        if latency_s < _TOO_LONG_S:
            many = list(islice(cycle(requests), _AT_ONCE))
            took = timed(lambda: [f.result() for f in [engine.submit(r) for r in many]])
            row["images_per_s"] = round(_AT_ONCE / took, 2)
        return {**row, "goals": GOALS}

    return with_engine(settings, measure)


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
