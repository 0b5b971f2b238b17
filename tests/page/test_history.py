"""The session's pictures, and what the page says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from unknown_words import unknown_words

from deploy.page import history, telling
from deploy.page.answers import Answer
from deploy.page.guard import is_allowed
from deploy.page.history import Session
from deploy.page.models import DEMO, examples_for, known_words, remark_on
from deploy.page.server import Health, Tick
from training.demo.language import known_words as taught

FORM = {"prompt": "A fox, in the <snow>!", "num_outputs": 3, "seed": "", "image": None}


def answer_of(*contents: bytes, **metrics: object) -> Answer:
    return Answer("succeeded", [(content, ".png") for content in contents], metrics=metrics)


def test_files_hold_the_servers_bytes_under_a_telling_name(tmp_path: Path) -> None:
    session = Session(tmp_path)
    run = session.add(FORM, answer_of(b"one", b"two", seeds=[7, 8]))
    assert [picture.path.name for picture in run.pictures] == [
        "a-fox-in-the-snow_seed-7.png",
        "a-fox-in-the-snow_seed-8.png",
    ]
    assert [picture.path.read_bytes() for picture in run.pictures] == [b"one", b"two"]
    session.close()
    assert list(tmp_path.iterdir()) == []


def test_a_picture_beside_a_withheld_one_has_its_own_seed(tmp_path: Path) -> None:
    metrics = {"seeds": [7, 8, 9], "withheld": [1], "flagged": [1], "nsfw_scores": [0, 0.93, 0]}
    run = Session(tmp_path).add(FORM, answer_of(b"first", b"third", **metrics))
    assert [picture.seed for picture in run.pictures] == [7, 9]
    said = telling.outcome(run.answer)
    assert "1 of 3 pictures withheld by the safety checker" in said
    assert "number 2 (0.93)" in said


def test_a_pictures_inputs_make_it_again_alone(tmp_path: Path) -> None:
    run = Session(tmp_path).add(FORM, answer_of(b"", b"", seeds=[7, 8]))
    assert run.values_of(run.pictures[1]) == {**FORM, "num_outputs": 1, "seed": 8}
    unknown = Session(tmp_path).add(FORM, answer_of(b""))
    assert unknown.values_of(unknown.pictures[0]) == FORM, "without a seed all of them are needed"


def test_the_oldest_go_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_PICTURES", 3)
    session = Session(tmp_path)
    for seed in (1, 2, 3, 4):
        session.add(FORM, answer_of(b"x", b"y", seeds=[seed, seed + 10]))
    assert [run.pictures[index].seed for run, index in session.pictures] == [4, 14]
    assert len(list(tmp_path.rglob("*.png"))) == 2
    session.add(FORM, answer_of(*[b"x"] * 4, seeds=[1, 2, 3, 4]))
    assert len(session.pictures) == 4, "the newest run stays whole"


def test_whatever_a_server_or_a_visitor_writes_is_escaped(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    metrics = {"seeds": [evil], "model": evil, "unread": [evil], "seconds": {"sample": 1}}
    run = Session(tmp_path).add({"prompt": evil}, answer_of(b"", **metrics))
    told = [
        telling.outcome(Answer("failed", error=evil)),
        telling.outcome(Answer("succeeded", metrics=metrics, notes=[evil])),
        telling.details(run, run.pictures[0]),
        telling.header(Health(evil, evil, evil)),
        telling.knowledge([evil], [evil], may_be_classified=True),
    ]
    for html in told:
        assert "<img" not in html
        assert "&lt;img" in html


def test_seconds_are_told_for_each_stage() -> None:
    html = telling.stages({"seconds": {"queue": 0, "sample": 1.5, "decode": 0.5}})
    assert "sample <b>1.50 s</b>" in html
    assert "in all <b>2.00 s</b>" in html
    assert 'class="sample" style="flex-grow:0.7500"' in html
    assert telling.stages({}) == ""


def test_waiting_and_working_are_told_apart() -> None:
    assert "full" in telling.under_way(Tick(3.2, is_waiting=True))
    assert "At work, 3 s" in telling.under_way(Tick(3.2, is_waiting=False))


@pytest.mark.parametrize("prompt", DEMO)
def test_the_demo_was_taught_its_examples(prompt: str) -> None:
    assert unknown_words(prompt, taught()) == []


def test_what_a_model_knows_is_said_of_the_demo_alone() -> None:
    assert examples_for("demo-1step") == DEMO
    assert examples_for("sdxl-4step") == examples_for("") != DEMO
    assert known_words("sdxl-4step") == known_words("demonic") == []
    assert "red" in known_words("demo")
    assert remark_on("a red zeppelin", ["a", "red"]).endswith("passes over: zeppelin")
    assert remark_on("a red zeppelin", []) == remark_on("red", ["red"]) == ""


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("127.0.0.1:7860", None, True),
        ("localhost:7860", "http://localhost:7860", True),
        ("[::1]:7860", None, True),
        ("rebound.example:7860", None, False),
        ("127.0.0.1.example", None, False),
        ("127.0.0.1:7860", "http://elsewhere.example", False),
        ("127.0.0.1:7860", "http://127.0.0.1:5000", False),
        ("127.0.0.1:7860", "null", False),
        ("", None, False),
        ("[", None, False),
    ],
)
def test_only_the_page_itself_on_this_machine_is_answered(
    host: str, origin: str | None, allowed: bool
) -> None:
    assert is_allowed(host, origin) is allowed
