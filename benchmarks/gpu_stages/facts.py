"""The machine: GPU, driver, versions, and how fast it can be at all."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_stages.scene import Scene
from gpu_stages.timing import median_ms

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "isal")
_SMI = (
    "name,driver_version,memory.total,memory.free,clocks.sm,clocks.mem,clocks.max.sm,"
    "power.limit,temperature.gpu,compute_mode"
)


def run(scene: Scene) -> dict[str, Any]:
    """Facts, then ceilings: what no way can beat on this machine."""
    device = torch.device(scene.device)
    is_cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if is_cuda else None
    free = torch.cuda.mem_get_info()[0] if is_cuda else None
    ceilings = {
        "matmul_tflops": matmul_tflops(device, scene.pick(8192, 256)),
        "copy_tb_per_s": copy_tb_per_s(device, scene.pick(2**32, 2**22)),
        "launches_per_s": launches_per_s(device, scene.pick(20_000, 200)),
    }
    name = properties.name if properties else f"CPU ({platform.machine()})"
    return {
        "headline": ", ".join([name, *(f"{k} {v:g}" for k, v in ceilings.items())]),
        "gpu": name,
        "capability": f"{properties.major}.{properties.minor}" if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "memory_gb": round(properties.total_memory / 1e9, 2) if properties else None,
        "free_gb": round(free / 1e9, 2) if free is not None else None,
        "nvidia_smi": smi(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": {
            backend: bool(getattr(torch.backends.cuda, f"{backend}_sdp_enabled")())
            for backend in ("cudnn", "flash", "mem_efficient", "math")
        },
        "versions": {"python": sys.version.split()[0]} | {p: version_of(p) for p in _PACKAGES},
        "cpus": os.cpu_count(),
        "has_gcc": shutil.which("gcc") is not None,
        "ceilings": ceilings,
    }


def matmul_tflops(device: torch.device, side: int) -> float:
    """Of a float16 product of two random square matrices."""
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    a @ b
    ms = median_ms(device, lambda: None, lambda _: a @ b, most=10)
    return round(2 * side**3 / ms / 1e9, 4)


def copy_tb_per_s(device: torch.device, size: int) -> float:
    """Bytes read and written by a copy on the device, a second."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms = median_ms(device, lambda: None, lambda _: target.copy_(source), most=10)
    return round(2 * size / ms / 1e9, 4)


def launches_per_s(device: torch.device, number: int) -> int:
    """How many smallest kernels the host launches a second, the device's time included."""
    one = torch.zeros(1, device=device)
    one.add_(1)

    def launch() -> None:
        for _ in range(number):
            one.add_(1)

    started = time.perf_counter()
    launch()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return round(number / (time.perf_counter() - started))


def smi() -> dict[str, str] | None:
    """What NVIDIA's tool says of the first GPU; None where there is none."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    command = [tool, "-i", "0", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in done.stdout.split(",")]
    names = _SMI.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
