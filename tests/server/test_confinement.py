"""What serving never does: unpickle, or reach for the network."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path

from components import write_checker
from model_folders import copy_with
from servers import start

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
PREDICTOR = """
import predict

class Predictor(predict.Predictor):
    pass
"""


def test_serving_neither_unpickles_nor_connects(model_folder: Path, tmp_path: Path) -> None:
    """From the import to the last picture, with the safety checker."""
    write_checker(tmp_path / "weights" / "nsfw-checker")
    model = copy_with(
        model_folder, tmp_path / "tiny", "dmd2.json", lambda card: card.pop("safety_checker")
    )
    notes, stub = tmp_path / "notes", tmp_path / "audited.py"
    stub.write_text(AUDITED.format(notes=str(notes)) + PREDICTOR)
    environment = {
        "COG_PREDICT_TYPE_STUB": f"{stub}:Predictor",
        "DMD2_WEIGHTS_DIR": str(tmp_path / "weights"),
        "DMD2_OUTPUT_DIR": str(tmp_path / "outputs"),
        "DMD2_SAFETY": "flag",
    }
    with start(model, **environment) as server:
        assert server.wait_until_set_up(120)["status"] == "READY"
        for output_format in ("png", "jpg", "webp"):
            answer = server.predict({"prompt": "a cat", "output_format": output_format})
            assert answer["status"] == "succeeded"
            assert answer["metrics"]["nsfw_scores"]
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
