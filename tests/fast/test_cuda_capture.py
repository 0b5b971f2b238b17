"""What follows a failed capture, on a fake torch.cuda; tests/test_gpu.py has a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from dmd2.fast import cuda_capture
from dmd2.fast.cuda_capture import CudaCapture

POOL = (0, 7)


class Cuda:
    """Notes what is asked of it.

    Attributes:
        ends: whether CUDA ends a capture that was broken off, or refuses.
        num_users: graphs that keep the pool: those whose capture began and that were not reset.
    """

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.is_capturing = False
        self.recording: set[Any] = set()
        self.told: list[str] = []
        self.num_users = 0

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, mode: str) -> Iterator[None]:
        assert mode == "thread_local"
        self.is_capturing = True
        self.recording.add(pool)
        self.num_users += 1
        try:
            yield
        finally:
            self.is_capturing = False
            if not self.ends:
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")
            self.recording.remove(pool)
            graph.is_ended = True

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)
        self.told.append("ended")

    def release(self, device: int, pool: Any) -> None:
        assert (device, pool) == (0, POOL)
        self.num_users -= 1
        self.told.append("released")


class Graph:
    """As CUDAGraph does, it gives up its pool when it is reset, if its capture was ended."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.is_ended = cuda, False

    def reset(self) -> None:
        if self.is_ended:
            self._cuda.num_users -= 1
        self.is_ended = False


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    fake = Cuda(request.param)
    for name, value in {
        "CUDAGraph": lambda: Graph(fake),
        "Stream": object,
        "current_device": lambda: 0,
        "graph": fake.graph,
        "graph_pool_handle": lambda: POOL,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", fake.release, raising=False)
    monkeypatch.setattr(cuda_capture, "_FAILED", [])
    cuda_capture._capture_stream.cache_clear()
    yield fake
    cuda_capture._capture_stream.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "told"), [(True, []), (False, ["ended", "released"])], indirect=["cuda"]
)
def test_torch_is_told_that_a_failed_capture_is_over_unless_it_knows(
    cuda: Cuda, told: list[str]
) -> None:
    calls: list[bool] = []

    def run() -> torch.Tensor:
        calls.append(cuda.is_capturing)
        if cuda.is_capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match=r"not permitted|Invalidated"):
        CudaCapture()(run)
    assert calls == [False, True]
    assert (cuda.recording, cuda.told) == (set(), told)
    assert len(cuda_capture._FAILED) == 1
    assert cuda.num_users == 0, "the pool is kept for good"


@pytest.mark.parametrize("cuda", [True], indirect=True)
def test_a_first_call_that_fails_was_no_capture(cuda: Cuda) -> None:
    def run() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaCapture()(run)
    assert (cuda.told, cuda.num_users) == ([], 0)
