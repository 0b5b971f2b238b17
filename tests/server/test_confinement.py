"""A server with every component, and what it never does: unpickle, or reach for the network.

Its log holds prompts, as it was told to.
"""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import CogServer, free_port
from components import write_checker, write_fast_decoder
from model_folders import copy_with
from servers import scrape, start

# Notes what Python's own audit events tell of, from every thread.
AUDITED = """
import sys

FORBIDDEN = {{"pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}}

def note(event, args):
    if event in FORBIDDEN:
        with open({notes!r}, "a") as notes:
            notes.write(f"{{event}} {{args}}\\n")

sys.addaudithook(note)
"""
COUNTERS = {
    "made": "dmd2_images_total",
    "flagged": "dmd2_images_flagged_total",
    "withheld": "dmd2_images_withheld_total",
}
PREDICTOR = """
import predict

class Predictor(predict.Predictor):
    pass
"""


@pytest.fixture(scope="module")
def port() -> int:
    """Of its metrics."""
    return free_port()


@pytest.fixture(scope="module")
def audited(
    model_folder: Path, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[CogServer, Path]]:
    """A server with every component, and the file that notes what it may not do."""
    folder = tmp_path_factory.mktemp("audited")
    write_checker(folder / "weights" / "nsfw-checker", nsfw_bias=1000.0)
    write_fast_decoder(folder / "weights" / "taesdxl")
    model = copy_with(
        model_folder, folder / "tiny", "dmd2.json", lambda card: card.pop("safety_checker")
    )
    notes, stub = folder / "notes", folder / "audited.py"
    stub.write_text(AUDITED.format(notes=str(notes)) + PREDICTOR)
    environment = {
        "COG_PREDICT_TYPE_STUB": f"{stub}:Predictor",
        "DMD2_WEIGHTS_DIR": str(folder / "weights"),
        "DMD2_OUTPUT_DIR": str(folder / "outputs"),
        "DMD2_SAFETY": "flag",
        "DMD2_LOG_PROMPTS": "1",
        "DMD2_METRICS_PORT": str(port),
    }
    with (folder / "log").open("wb") as log, start(model, log, **environment) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        yield server, notes


def test_prompts_are_logged_when_asked_for(audited: tuple[CogServer, Path]) -> None:
    server, notes = audited
    assert server.predict({"prompt": "a secret circle"}, id="named")["status"] == "succeeded"
    lines = (notes.parent / "log").read_text().splitlines()
    assert any("[named]" in line and "'a secret circle'" in line for line in lines)


def test_flagged_images_are_named_and_counted(audited: tuple[CogServer, Path], port: int) -> None:
    before = scrape(port)
    metrics = audited[0].predict({"prompt": "x", "seed": 1, "num_outputs": 2})["metrics"]
    assert metrics["flagged"] == [0, 1]
    assert metrics["withheld"] == []
    assert metrics["nsfw_scores"] == pytest.approx([1.0, 1.0])
    assert metrics["seconds"]["check"] > 0
    after = scrape(port)
    added = {of: after[name] - before[name] for of, name in COUNTERS.items()}
    assert added == {"made": 2, "flagged": 2, "withheld": 0}


def test_the_fast_decoder_is_served(audited: tuple[CogServer, Path]) -> None:
    inputs = {"prompt": "a star", "seed": 5}
    answers = [audited[0].predict({**inputs, "fast_decode": fast}) for fast in (True, False)]
    assert [answer["status"] for answer in answers] == ["succeeded", "succeeded"]
    assert answers[0]["output"] != answers[1]["output"]


def test_no_loras_are_taken_unless_the_operator_says_so(audited: tuple[CogServer, Path]) -> None:
    refused = audited[0].predict({"prompt": "x", "lora_weights": "owner/repo"})
    assert "takes no LoRAs from requests (DMD2_LORA_SOURCES is empty)" in refused["error"]


def test_serving_neither_unpickles_nor_connects(audited: tuple[CogServer, Path], port: int) -> None:
    """From the import to the last picture, with the safety checker and the fast decoder."""
    server, notes = audited
    for output_format in ("png", "jpg", "webp"):
        for fast in (True, False):
            inputs = {"prompt": "a cat", "output_format": output_format, "fast_decode": fast}
            answer = server.predict(inputs)
            assert answer["status"] == "succeeded"
            assert answer["metrics"]["nsfw_scores"]
    scrape(port)
    assert not notes.exists(), notes.read_text()


def test_the_audit_sees_both(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    notes, pickled = tmp_path / "notes", pickle.dumps(Path("x"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        misdeeds = f"""
import pickle, socket
pickle.loads({pickled!r})
socket.create_connection(("127.0.0.1", {port})).close()
"""
        program = AUDITED.format(notes=str(notes)) + misdeeds
        subprocess.run([sys.executable, "-c", program], check=True)
    for event in ("pickle.find_class", "socket.getaddrinfo", "socket.connect"):
        assert event in notes.read_text()
