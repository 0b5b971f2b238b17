"""What README and docs/method.md say of the demo is in training/RESULTS.md and config.py."""

from __future__ import annotations

import re

import pytest
from results_tables import percent, read_tables

from dmd2.settings import ROOT
from training.config import DEMO, SDXL_FULL, SDXL_LORA, DistillConfig
from training.demo.results import SHEET_CAPTIONS

TABLES = read_tables()
ALONE, PAIRS = TABLES["One thing"], TABLES["Two things"]
OTHERS, SUBJECT = TABLES["Distance to the data"], TABLES["A LoRA for a hedgehog"]
# The rows of method.md's table, by those of RESULTS.md.
CONTESTANTS = {
    "teacher, DDIM in 20": "teacher, guided (2.0), 20 steps of DDIM",
    "teacher, DDIM in 4": "teacher, 4 steps",
    "teacher, DDIM in 1": "teacher, 1 step",
    "student 4step": "student, 4 steps",
    "student 1step": "student, 1 step",
    "student lora": "student, LoRA, 4 steps",
}


def text_of(name: str) -> str:
    """A document in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def whole(cell: str) -> str:
    """Without decimals: "85.4 (82-88)" gives "85 (82-88)"."""
    return re.sub(r"^[\d.]+", lambda found: f"{float(found[0]):.0f}", cell)


def right(name: str, table: dict[str, dict[str, str]] = ALONE) -> str:
    """Of 100 pictures, those with everything right."""
    return f"{percent(table[name]['all']):.0f}"


def rates(config: DistillConfig) -> str:
    """Of the student and the fake score network, as "5e-7, 5e-4"."""
    both = (config.student_learning_rate, config.fake_learning_rate)
    return ", ".join(f"{rate:.0e}".replace("e-0", "e-") for rate in both)


def in_method() -> list[str]:
    """Its sentences and rows with figures of RESULTS.md."""
    rows = [
        f"| {said} | {whole(ALONE[name]['all'])} | {whole(PAIRS[name]['all'])} "
        f"| {OTHERS[name]['diversity']} |"
        for name, said in CONTESTANTS.items()
    ]
    ms = {name: int(row["ms a picture"]) for name, row in OTHERS.items()}
    share = {8: "an eighth"}[ms["teacher, DDIM in 20"] // ms["student 1step"]]
    four_step, training = OTHERS["student 4step"], TABLES["Training time"]["4step"]
    return [
        *rows,
        f"right about {right('drawings')} % and {right('drawings', PAIRS)} % of drawings",
        f"as twenty with guidance, at {share} of the time",
        f"DDIM reaches {right('teacher, DDIM in 4')} %",
        f"is as right and keeps {four_step['diversity']} ({four_step['Fréchet distance']})",
        f"the 4-step one {training['steps']} steps of {DEMO.students['4step'].batch_size} "
        f"in {training['minutes']} minutes",
    ]


def in_readme() -> list[str]:
    """Its sentences with figures of RESULTS.md."""
    students = ("student 4step", "student 1step")
    (four, one), pairs = map(right, students), [right(name, PAIRS) for name in students]
    taught = 64 * percent(SUBJECT["with the LoRA"]["hedgehog"]) / 100
    assert percent(SUBJECT["without it"]["hedgehog"]) == 0
    return [
        f"itself right about {right('drawings')} of 100",
        f"in {four} of 100 pictures in four steps and in {one} in one; of two things both in "
        f"{' and '.join(pairs)} (",
        f"{taught:.0f} of 64 pictures of a hedgehog are nearest to a drawing of one; without it "
        "none is",
    ]


@pytest.mark.parametrize("said", in_method())
def test_method_says_what_was_measured(said: str) -> None:
    assert said in text_of("docs/method.md")


@pytest.mark.parametrize("said", in_readme())
def test_the_readme_says_what_was_measured(said: str) -> None:
    assert said in text_of("README.md")


def test_method_has_the_rates_of_the_configuration() -> None:
    four_step, one_step, lora = (rates(DEMO.students[name]) for name in ("4step", "1step", "lora"))
    assert (
        f"| {four_step}; 1 step {one_step}; LoRA {lora} "
        f"| {rates(SDXL_FULL)}; LoRA {rates(SDXL_LORA)} |"
    ) in text_of("docs/method.md")


def test_the_samples_are_as_large_as_is_said() -> None:
    results, method = text_of("training/RESULTS.md"), text_of("docs/method.md")
    sizes = re.search(
        r"One thing \((\d+) captions.*Two things \((\d+) held-out captions.*distance between "
        r"(\d+) pictures",
        results,
    )
    assert sizes is not None
    alone, pairs, same = sizes.groups()
    assert f"On {alone} held-out captions of one thing and {pairs} of two" in method
    assert f'how much {same} pictures of "a fox" differ' in method


def test_the_readme_names_the_prompts_of_its_sheet() -> None:
    *first, last = (f"*{caption}*" for caption in SHEET_CAPTIONS)
    assert f"{', '.join(first)} and {last}" in text_of("README.md")
