"""What is in the image, and what the scripts do inside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from containers import docker, image

from dmd2.settings import ROOT
from dmd2.store.manifest import Manifest, verify

pytestmark = pytest.mark.docker
# Every file under /src with its bytes, as JSON.
FILES = """
import json, os
print(json.dumps({os.path.join(folder, name): os.lstat(os.path.join(folder, name)).st_size
    for folder, _, names in os.walk("/src") for name in names}))
"""
MAX_BYTES = 1_000_000
# Of those of a checkout that no server needs: what is there.
STRANGERS = """
import importlib.util
names = ("ray", "starlette", "uvicorn", "gradio", "pytest", "peft", "training", "deploy")
print([name for name in names if importlib.util.find_spec(name)])
"""


def test_it_holds_what_serves_and_nothing_else() -> None:
    files = json.loads(docker("run", "--rm", image(), "python", "-c", FILES))
    names = {str(Path(path).relative_to("/src")): size for path, size in files.items()}
    top = {name.split("/")[0] for name in names}
    assert top == {
        ".cog", "LICENSE", "cog.yaml", "dmd2", "predict.py", "requirements.txt", "weights"
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or "_cache" in name]
    assert not [name for name in names if name.startswith(("weights/.", "weights/tokenizer"))]
    assert {"weights/manifest.json", "weights/demo/dmd2.json"} <= set(names)
    tracked = subprocess.run(
        ["git", "ls-files", "dmd2"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in names if name.startswith("dmd2/")} == set(tracked)
    ours = [size for name, size in names.items() if not name.startswith("weights/")]
    print(f"the image without packages and weights: {sum(ours)} bytes in {len(ours)} files")
    assert sum(ours) < MAX_BYTES


def test_it_has_nothing_of_the_gateway_the_page_and_the_tests() -> None:
    assert docker("run", "--rm", image(), "python", "-c", STRANGERS).strip() == "[]"


def test_scripts_inside_leave_a_mounted_checkout_its_environment(tmp_path: Path) -> None:
    """`cog exec scripts/download-weights` mounts the checkout so, as root."""
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("the host's own")
    before = tree_of(checkout / ".venv")
    mounted = ["run", "--rm", "-v", f"{checkout}:/src", "-w", "/src"]
    docker(*mounted, image(), "scripts/download-weights", "demo-1step")
    assert verify(Manifest.read().models["demo-1step"], checkout / "weights" / "demo-1step") == []
    assert tree_of(checkout / ".venv") == before


def tree_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Each path under a folder with its time of change and size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
