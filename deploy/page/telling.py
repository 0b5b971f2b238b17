"""What the page says, as HTML: every text in it is escaped, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from deploy.page.answers import Answer
from deploy.page.history import Picture, Run
from deploy.page.server import Health, Tick

STAGES = ("queue", "encode", "sample", "decode", "check", "save")
_IN_WORDS = {
    "READY": "ready",
    "BUSY": "busy",
    "STARTING": "starting",
    "SETUP_FAILED": "setup failed",
    "UNHEALTHY": "unhealthy",
    "DEFUNCT": "out of order",
}


def header(health: Health | None) -> str:
    """The page's head: its name, and how the server is; None where it does not answer."""
    status = "not reachable" if health is None else _IN_WORDS.get(health.status, health.status)
    good = health is not None and health.status in ("READY", "BUSY")
    name = "" if health is None or not health.model else f"<b>{escape(health.model)}</b>"
    device = "" if health is None or not health.device else f"on {escape(health.device)}"
    return (
        '<header class="head"><h1>DMD2<span>pictures in a few steps</span></h1>'
        f'<p class="health {"good" if good else "bad"}" role="status">'
        f"<i></i>{name} {device} <span>{escape(status)}</span></p></header>"
    )


def nothing_yet() -> str:
    """Where the pictures will be."""
    return '<div class="empty"><p>Your pictures appear here.</p></div>'


def notice(kind: str, title: str, *lines: str) -> str:
    """A box: kind is "error", "warn", "info" or "work"."""
    role = "alert" if kind == "error" else "status"
    text = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    return f'<div class="notice {kind}" role="{role}"><b>{escape(title)}</b>{text}</div>'


def under_way(tick: Tick) -> str:
    """What a tick says."""
    seconds = f"{tick.seconds:.0f} s"
    if tick.is_waiting:
        return notice("work", f"The server is full: waiting for a free place, {seconds}")
    return notice("work", f"At work, {seconds}")


def outcome(answer: Answer) -> str:
    """What is to say of an answer beside its pictures: an error, what was withheld, remarks."""
    if answer.status == "canceled":
        return notice("info", "Cancelled", "The server has given it up; nothing was kept.")
    if answer.status != "succeeded":
        return notice("error", "The server refused", *answer.error.splitlines())
    notices = [notice("warn", title, text) for title, text in _withheld(answer)]
    if unread := answer.metrics.get("unread"):
        notices.append(notice("warn", "The prompt is longer than the model reads", _cut(unread)))
    notices += [notice("info", note) for note in answer.notes]
    return "".join(notices)


def _withheld(answer: Answer) -> list[tuple[str, str]]:
    metrics = answer.metrics
    withheld = metrics.get("withheld") or []
    flagged = [index for index in metrics.get("flagged") or [] if index not in withheld]
    total = len(metrics.get("seeds") or answer.pictures)
    said = []
    if withheld:
        said.append(
            (
                f"{len(withheld)} of {total} pictures withheld by the safety checker",
                "It took them for nudity or sex, in which it may be wrong. Which: "
                + ", ".join(_scored(index, metrics) for index in withheld),
            )
        )
    if flagged:
        said.append(
            (
                f"{len(flagged)} of {total} pictures flagged by the safety checker",
                "This server returns such pictures, as they are or blurred. Which: "
                + ", ".join(_scored(index, metrics) for index in flagged),
            )
        )
    return said


def _scored(index: int, metrics: Mapping[str, Any]) -> str:
    scores = metrics.get("nsfw_scores") or []
    score = scores[index] if index < len(scores) else None
    return f"number {index + 1} ({'the checker failed' if score is None else f'{score:.2f}'})"


def _cut(unread: Any) -> str:
    words = " ".join(map(str, unread)) if isinstance(unread, list) else str(unread)
    return f"Not read: {words}"


def details(run: Run, picture: Picture) -> str:
    """What a picture is, and where its request's seconds went."""
    metrics = run.answer.metrics
    facts = [
        ("seed", picture.seed),
        ("size", _size(metrics)),
        ("steps", metrics.get("steps")),
        ("model", metrics.get("model")),
        ("safety", _safety(metrics)),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts
        if value not in (None, "")
    )
    prompt = escape(str(run.values.get("prompt") or ""))
    return (
        f'<section class="details"><p class="prompt">{prompt}</p><dl>{shown}</dl>'
        f"{stages(metrics)}</section>"
    )


def _size(metrics: Mapping[str, Any]) -> str:
    width, height = metrics.get("width"), metrics.get("height")
    return f"{width}x{height}" if width and height else ""


def _safety(metrics: Mapping[str, Any]) -> str:
    return "classified" if metrics.get("nsfw_scores") else "not classified"


def stages(metrics: Mapping[str, Any]) -> str:
    """A bar with a part for each stage, and the seconds of each."""
    seconds = metrics.get("seconds") or {}
    told = [(name, float(seconds[name])) for name in STAGES if name in seconds]
    total = sum(value for _, value in told)
    if not told or total <= 0:
        return ""
    bar = "".join(
        f'<i class="{name}" style="flex-grow:{value / total:.4f}"></i>'
        for name, value in told
        if value / total >= 0.004
    )
    legend = "".join(
        f'<li class="{name}"><i></i>{name} <b>{value:.2f} s</b></li>' for name, value in told
    )
    return (
        f'<div class="stages"><div class="bar" aria-hidden="true">{bar}</div>'
        f"<ul>{legend}<li>in all <b>{total:.2f} s</b></li></ul></div>"
    )


def knowledge(words: Sequence[str], others: Sequence[str], *, may_be_classified: bool) -> str:
    """What the model knows, what is withheld, and which inputs have no field here."""
    if words:
        knows = (
            f"<p>This is the demo model. It knows these {len(words)} words and passes over all "
            f'others:</p><p class="words">{escape(" ".join(sorted(words)))}</p>'
        )
    else:
        knows = (
            "<p>The encoders read 77 tokens, about 75 words, of a prompt; the page names those "
            "that were cut.</p>"
        )
    safety = (
        "<p>Where the server has a safety checker, each picture is classified before it leaves. "
        "One that is taken for nudity or sex is withheld or blurred, as the server's operator "
        "chose, and the page says so. It sees neither violence nor likenesses, and it errs. The "
        "bundled demo has none.</p>"
        if may_be_classified
        else ""
    )
    rest = f"<p>Over HTTP alone: {escape(', '.join(others))}.</p>" if others else ""
    return f'<div class="knowledge">{knows}{safety}{rest}</div>'
