"""Make a Python environment of the checkout if it is needed and not there; print its Python.

    environment.py SCRIPT    what is needed is what that script imports
    environment.py gateway   what is needed is Ray, beside what the Python that runs this has

.venv is for all but the page, whose packages do not agree with it: it has .venv-page. Ray is for a
gateway with many engines alone: .venv-gateway is a layer on the environment that asks for it, and
holds what that lacks. A Python that has all of it already, as in the container, is taken as it is.
Runs on any Python from 3.11 on, with the standard library alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CONTAINER, CHECKOUT = ROOT / "requirements.txt", ROOT / "requirements-dev.txt"
# What the container's packages are enough for.
SERVING_ALONE = {"download_cli.py", "verify_cli.py"}
# On Linux the usual torch brings gigabytes of CUDA; uv knows where PyTorch keeps its CPU builds.
UV = "uv==0.13.9"
NO_CUDA = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__}:", *(each.message for each in said))
"""


@dataclass(frozen=True)
class Environment:
    """One environment of the checkout.

    Attributes:
        folder: where it lies.
        files: the requirement files that it is made from.
        size: what it takes on the disk, in words.
        below: the packages of the Python that it is a layer on; None where it stands alone.
    """

    folder: Path
    files: tuple[Path, ...]
    size: str
    below: Path | None = None

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    @property
    def has_torch(self) -> bool:
        """Whether torch is part of it, which depends on the machine."""
        return any(pin.startswith("torch==") for pin in pins_of(*self.files))

    def pins(self) -> list[str]:
        """What is to be installed, but for torch; a layer has what the Python below it lacks."""
        pins = [pin for pin in pins_of(*self.files) if not pin.startswith("torch==")]
        return pins if self.below is None else [pin for pin in pins if not is_installed(pin)]

    def fingerprint(self) -> str:
        """What it was made from: when it changes, the environment is made again."""
        digest = hashlib.sha256(f"{sys.version} {self.has_torch and has_gpu()}".encode())
        for path in self.files:
            digest.update(path.read_bytes())
        if self.below is not None:
            digest.update("\n".join([str(self.below), *self.pins()]).encode())
        return digest.hexdigest()


USUAL = Environment(ROOT / ".venv", (CONTAINER, CHECKOUT), "about 1.6 GB")
PAGE = Environment(
    ROOT / ".venv-page", (ROOT / "deploy" / "page" / "requirements.txt",), "about 400 MB"
)


def main() -> None:
    """Print the environment's Python; everything else goes to standard error."""
    script = Path(sys.argv[1]).name if len(sys.argv) > 1 else ""
    if script == "gateway":
        print(ready(gateway()))
        return
    environment = PAGE if script == "page_cli.py" else USUAL
    needed = (CONTAINER,) if script in SERVING_ALONE else environment.files
    if all(is_installed(line) for line in pins_of(*needed)):
        print(sys.executable)
        return
    print(ready(environment))


def gateway() -> Environment:
    """Of a gateway with many engines: a layer on the Python that runs this."""
    pins = ROOT / "deploy" / "gateway" / "requirements.txt"
    below = Path(sysconfig.get_path("purelib"))
    return Environment(ROOT / ".venv-gateway", (pins,), "about 400 MB", below)


def ready(environment: Environment) -> Path:
    """An environment's Python, once it is made; of a layer that holds nothing, the one below."""
    if environment.below is not None and not environment.pins():
        return Path(sys.executable)
    with environment.folder.with_name(f"{environment.folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = environment.folder / "complete"
        wanted = environment.fingerprint()
        if not stamp.exists() or stamp.read_text() != wanted:
            build(environment)
            stamp.write_text(wanted)
    return environment.python


def pins_of(*files: Path) -> list[str]:
    """The pins in requirement files."""
    lines = [line for path in files for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def torch_pins() -> list[str]:
    """The container's and the checkout's."""
    return [pin for pin in pins_of(CONTAINER, CHECKOUT) if pin.startswith("torch==")]


def is_installed(pin: str) -> bool:
    """Whether this Python has what a line of requirements.txt pins; of torch, either pin."""
    name = pin.partition("==")[0].partition("[")[0]
    try:
        found = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return False
    if name == "torch":
        return f"torch=={found}" in torch_pins()
    return found == pin.partition("==")[2]


def has_gpu() -> bool:
    """Whether NVIDIA's driver answers."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def build(environment: Environment) -> None:
    """Make the environment from nothing."""
    started = time.monotonic()
    has_cuda = environment.has_torch and has_gpu()
    size = "with CUDA: about 6 GB" if has_cuda else environment.size
    name = environment.folder.name
    say(f"making the Python environment in {name} ({size}, once; one to five minutes)")
    make_venv(environment.folder)
    rest = environment.folder / "requirements.txt"
    rest.write_text("\n".join(environment.pins()))
    if environment.has_torch:
        install_torch(environment.python)
    # A layer's pip does not know what lies below; that it is enough, the pins say.
    options = [] if environment.below is None else ["--no-deps"]
    if not pip(environment.python, *options, "-r", str(rest)):
        sys.exit("The packages could not be installed; the reason stands above.")
    if environment.below is not None:
        (own,) = environment.folder.glob("lib/python*/site-packages")
        (own / "below.pth").write_text(f"{environment.below}\n")
    if has_cuda:
        say_why_without_cuda(environment.python)
    say(f"the environment is ready after {time.monotonic() - started:.0f} s")


def make_venv(folder: Path) -> None:
    """An empty environment with pip: by uv, which needs no ensurepip, or by Python's own venv."""
    shutil.rmtree(folder, ignore_errors=True)
    if (uv := shutil.which("uv")) is not None:
        command = [uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)]
    else:
        command = [sys.executable, "-m", "venv", str(folder)]
    # Debian's venv says on standard output why it fails, where the shell takes this Python's name.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(
            f"{done.stdout.strip()}\n\n{' '.join(command)} failed. Install Python's venv "
            "(Debian and Ubuntu: apt install python3-venv) or uv, and try again."
        )


def install_torch(python: Path) -> None:
    """Install torch: the container's where there is a GPU, else a CPU build within reach."""
    container, checkout = torch_pins()
    requirement = container if has_gpu() else checkout
    if platform.system() == "Linux" and not has_gpu():
        if pip(python, f"{requirement}+cpu", quiet=True) or uv_installs_cpu_build(
            python, requirement
        ):
            return
        say("no CPU build of torch within reach: taking the usual one, with gigabytes of CUDA")
    if not pip(python, requirement):
        sys.exit(f"{requirement} could not be installed; the reason stands above.")


def say_why_without_cuda(python: Path) -> None:
    """Say what torch has against the GPU, if it does not take it."""
    if why := why_without_cuda(str(python)):
        say(f"{why}, so that everything runs on the CPU")


def why_without_cuda(python: str) -> str:
    """What a Python's torch has against the GPU that is there; "" where it takes it."""
    done = subprocess.run([python, "-c", NO_CUDA], capture_output=True, text=True)
    why = (done.stdout + done.stderr).strip()
    return f"there is a GPU, and torch finds no CUDA ({why})" if why else ""


def uv_installs_cpu_build(python: Path, requirement: str) -> bool:
    """Whether uv could install torch from PyTorch's own CPU builds."""
    if not pip(python, UV, quiet=True):
        return False
    uv = [str(python.with_name("uv")), "pip", "install", "--quiet", "--torch-backend", "cpu"]
    target = ["--python", str(python), requirement]
    return subprocess.run([*uv, *target], stderr=subprocess.DEVNULL).returncode == 0


def pip(python: Path, *arguments: str, quiet: bool = False) -> bool:
    """Run pip install in an environment; what it says is shown where it fails, unless quiet."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input"]
    options = ["--disable-pip-version-check", *arguments]
    done = subprocess.run(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and not quiet:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def say(line: str) -> None:
    """A line of progress."""
    print(f"dmd2-cog: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
