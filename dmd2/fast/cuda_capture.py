"""The capture of CUDA graphs, and what torch leaves undone where one fails."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

# torch's allocators ask a graph whose capture failed, whenever another captures.
_FAILED: list[torch.cuda.CUDAGraph] = []


class CudaCapture:
    """Captures into CUDA graphs that share a pool of memory, and go with the last of their replays.

    For the GPU thread. Replays are launched on its current stream.
    """

    def __init__(self) -> None:
        self._stream = _capture_stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Wait for the device, call run once, and capture its second call.

        Returns:
            Its replay, which returns the same tensor each time. Tensors that run reads have to
            stay where they are.

        Raises:
            Exception: of many kinds, running out of memory included: in a capture torch does not
                always tell that from other errors. No other capture may follow by this object.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            output = self._captured(graph, run)
        except Exception:
            self._end_failed(graph)
            raise

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def _captured(
        self, graph: torch.cuda.CUDAGraph, run: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        # Where a capture breaks off, torch.cuda.graph leaves its stream the current one.
        with torch.cuda.stream(self._stream):
            torch.cuda.synchronize()
            run()  # on this stream cuDNN and cuBLAS prepare what cannot be prepared in a capture
            # "thread_local": what other threads do meanwhile is no error.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                return run()

    def _end_failed(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let torch know that nothing is captured any more.

        Where CUDA has ended the capture, the graph counts as a user of the pool, whose memory is
        given back only when none is left; it is kept here, so it has to be reset.

        If CUDA refuses to end a capture, torch's allocator takes it to go on: from then on it
        keeps the pool, and raises wherever it is to give memory back (seen in the source of torch
        2.11's CUDAGraph::capture_end).
        """
        graph.reset()
        _FAILED.append(graph)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # torch did know
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)


@functools.cache
def _capture_stream() -> Any:
    """One for all captures: cuBLAS keeps a workspace for each stream that it has worked on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
