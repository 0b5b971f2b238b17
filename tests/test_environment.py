"""The checkout's environment on machines unlike this one, which stand-ins on PATH play."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import environment
import pytest

from dmd2.settings import ROOT

# A Python of a made environment: notes how it is called, and says what pip or torch would say.
PYTHON = """#!/bin/sh
echo "$*" >> {calls}
case "$*" in
  *"{fails}"*) echo "ERROR: no such package"; exit 1;;
  *"import warnings"*) echo "torch 2.11.0: the driver is too old";;
  *) echo "WARNING: a mirror is not there";;
esac
"""


class Machine:
    """A checkout of scripts/lib, and a folder that is first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin, self.calls = (folder / n for n in ("checkout", "bin", "calls"))
        lib = self.checkout / "scripts" / "lib"
        lib.mkdir(parents=True)
        self.bin.mkdir()
        for name in ("environment.py", "python"):
            (lib / name).write_bytes((ROOT / "scripts" / "lib" / name).read_bytes())
        self.pin(["torch==2.11.0", "left==1"], ["torch==2.13.0", "right==2"])

    def pin(self, container: list[str], checkout: list[str]) -> None:
        (self.checkout / "requirements.txt").write_text("\n".join(["# pins", *container]))
        (self.checkout / "requirements-dev.txt").write_text("\n".join(checkout))

    def has(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(0o755)

    def has_uv(self, fails: str = "nothing fails") -> None:
        """Its venv is the stand-in above."""
        python = self.bin / "made-python"
        self.has(python.name, PYTHON.format(calls=self.calls, fails=fails))
        make = (
            'for last; do :; done; mkdir -p "$last/bin" "$last/lib/python3/site-packages" && '
            'cp "$0-python" "$last/bin/python"'
        )
        self.has("uv", f'#!/bin/sh\necho "uv $*" >> {self.calls}\n{make}\n')
        python.rename(self.bin / "uv-python")

    def run(self, script: str = "predict_cli.py", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, self.checkout / "scripts/lib/environment.py", script],
            env={"PATH": f"{self.bin}:{os.defpath}", **more},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_debians_python_without_venv_is_told_what_to_install(
    machine: Machine, tmp_path: Path
) -> None:
    """Its venv says why on standard output, which the shell captures."""
    (tmp_path / "venv.py").write_text("print('ensurepip is not available'); raise SystemExit(1)")
    done = machine.run(PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stdout == ""
    assert "ensurepip is not available" in done.stderr
    assert "apt install python3-venv" in done.stderr


def test_uv_makes_the_environment_where_it_is(machine: Machine) -> None:
    machine.has_uv()
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(machine.checkout / ".venv/bin/python")
    calls = machine.calls.read_text().splitlines()
    assert calls[0].startswith("uv venv")
    assert "torch==2.13.0+cpu" in calls[1]
    assert "WARNING" not in done.stderr, "pip is heard only where it fails"
    assert machine.run().stderr == "", "made once"


def test_pip_is_heard_where_it_fails(machine: Machine) -> None:
    machine.has_uv(fails="requirements.txt")
    done = machine.run()
    assert done.returncode != 0
    assert "ERROR: no such package" in done.stderr


def test_a_gpu_gets_the_containers_torch_and_is_told_why_it_does_not_work(
    machine: Machine,
) -> None:
    machine.has_uv()
    machine.has("nvidia-smi", "#!/bin/sh\necho GPU 0: NVIDIA H100")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert "torch==2.11.0" in calls
    assert "torch==2.13.0" not in calls
    assert "torch finds no CUDA" in done.stderr
    assert "the driver is too old" in done.stderr


def test_a_driver_that_does_not_answer_is_no_gpu(machine: Machine) -> None:
    machine.has_uv()
    machine.has("nvidia-smi", "#!/bin/sh\nexit 9")
    assert machine.run().returncode == 0
    assert "torch==2.13.0+cpu" in machine.calls.read_text()


def test_a_python_that_has_all_of_it_is_taken_as_it_is(machine: Machine) -> None:
    """As in the container, whose checkout may be mounted from a host with an environment."""
    here = [f"{name}=={version(name)}" for name in ("packaging", "pillow")]
    torch = f"torch=={version('torch').partition('+')[0]}"
    machine.pin([*here, torch], ["torch==0.1", "absent==1.0"])
    machine.has_uv()
    for script, own in (("download_cli.py", True), ("predict_cli.py", False)):
        done = machine.run(f"{machine.checkout}/scripts/lib/{script}")
        assert (done.stdout.strip() == sys.executable) == own
        assert (machine.checkout / ".venv").exists() != own
        assert (machine.checkout / ".venv.lock").exists() != own


def test_another_version_is_not_taken(machine: Machine) -> None:
    machine.pin(["torch==0.0.1", "packaging==0.0.1"], ["torch==0.0.2"])
    machine.has_uv()
    assert machine.run("download_cli.py").stdout.strip() != sys.executable


def test_the_page_has_an_environment_of_its_own(machine: Machine) -> None:
    machine.has_uv()
    pins = machine.checkout / "deploy" / "page" / "requirements.txt"
    pins.parent.mkdir(parents=True)
    pins.write_text("gradio==6")
    done = machine.run("page_cli.py")
    assert done.stdout.strip() == str(machine.checkout / ".venv-page/bin/python")
    assert (machine.checkout / ".venv-page/requirements.txt").read_text() == "gradio==6"
    assert "torch" not in machine.calls.read_text()
    assert not (machine.checkout / ".venv").exists()


def test_the_gateways_environment_is_a_layer_of_what_the_one_below_lacks(machine: Machine) -> None:
    machine.has_uv()
    pins = machine.checkout / "deploy" / "gateway" / "requirements.txt"
    pins.parent.mkdir(parents=True)
    here = f"packaging=={version('packaging')}"
    pins.write_text(f"# Ray.\nray[serve]==0.0.1\n{here}\npillow==0.0.1\n")
    done = machine.run("gateway")
    layer = machine.checkout / ".venv-gateway"
    assert done.stdout.strip() == str(layer / "bin/python"), done.stderr
    assert (layer / "requirements.txt").read_text() == "ray[serve]==0.0.1\npillow==0.0.1"
    assert "--no-deps" in machine.calls.read_text()
    (pth,) = layer.glob("lib/python*/site-packages/below.pth")
    assert pth.read_text().strip() == sysconfig.get_path("purelib")
    assert not (machine.checkout / ".venv").exists()
    assert machine.run("gateway").stderr == "", "made once"
    pins.write_text(f"ray[serve]==0.0.2\n{here}\n")
    assert "making the Python environment" in machine.run("gateway").stderr
    pins.write_text(f"{here}\n")
    assert machine.run("gateway").stdout.strip() == sys.executable, "nothing is lacking"


def test_the_gateways_pins_are_those_of_the_environment_below() -> None:
    gateway = pins_by_name(ROOT / "deploy" / "gateway" / "requirements.txt")
    below = pins_by_name(environment.CONTAINER) | pins_by_name(environment.CHECKOUT)
    common = gateway.keys() & below.keys()
    assert {name: gateway[name] for name in common} == {name: below[name] for name in common}
    assert {"starlette", "uvicorn", "prometheus-client", "h11"} <= common
    assert {"ray", "grpcio"} <= gateway.keys() - below.keys()


def pins_by_name(path: Path) -> dict[str, str]:
    pins = [pin.partition("==") for pin in environment.pins_of(path)]
    return {name.partition("[")[0]: number for name, _, number in pins}
