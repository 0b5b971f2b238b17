"""Make the checkout's Python environment (.venv) if it is not there, and print its Python.

Runs on any Python from 3.11 on, with the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
# On Linux the usual torch brings gigabytes of CUDA; uv knows where PyTorch keeps its CPU builds.
UV = "uv==0.13.9"


def main() -> None:
    """Print the environment's Python; everything else goes to standard error."""
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = VENV / "complete"
        wanted = fingerprint()
        if not stamp.exists() or stamp.read_text() != wanted:
            build()
            stamp.write_text(wanted)
    print(VENV / "bin" / "python")


def fingerprint() -> str:
    """What the environment was made from: when it changes, the environment is made again."""
    digest = hashlib.sha256(sys.version.encode())
    for path in REQUIREMENTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build() -> None:
    """Make the environment from nothing."""
    started = time.monotonic()
    say("making the Python environment in .venv (about 1.6 GB, once; one to five minutes)")
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except subprocess.CalledProcessError:
        sys.exit("This Python has no ensurepip (Debian and Ubuntu: apt install python3-venv).")
    lines = [line for path in REQUIREMENTS for line in path.read_text().splitlines()]
    torch = [line for line in lines if line.startswith("torch==")][-1]
    rest = VENV / "requirements.txt"
    rest.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
    install_torch(torch)
    if not pip("-r", str(rest)):
        sys.exit("The packages could not be installed; the reason stands above.")
    say(f"the environment is ready after {time.monotonic() - started:.0f} s")


def install_torch(requirement: str) -> None:
    """Install torch's CPU build from wherever this machine's pip finds one."""
    if platform.system() == "Linux":
        if pip(f"{requirement}+cpu", quiet=True) or uv_installs_cpu_build(requirement):
            return
        say("no CPU build of torch within reach: taking the usual one, with gigabytes of CUDA")
    if not pip(requirement):
        sys.exit(f"{requirement} could not be installed; the reason stands above.")


def uv_installs_cpu_build(requirement: str) -> bool:
    """Whether uv could install torch from PyTorch's own CPU builds."""
    if not pip(UV, quiet=True):
        return False
    uv = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--torch-backend", "cpu"]
    target = ["--python", str(VENV / "bin" / "python"), requirement]
    return subprocess.run([*uv, *target], stderr=subprocess.DEVNULL).returncode == 0


def pip(*arguments: str, quiet: bool = False) -> bool:
    """Run pip install in the environment, its output to standard error or, if quiet, nowhere."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
    options = ["--disable-pip-version-check", *arguments]
    out = subprocess.DEVNULL if quiet else sys.stderr
    return subprocess.run([*command, *options], stdout=out, stderr=out).returncode == 0


def say(line: str) -> None:
    """A line of progress."""
    print(f"dmd2-cog: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
