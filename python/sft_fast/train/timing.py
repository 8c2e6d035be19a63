"""Where the time of a step goes, without slowing it down.

On a GPU, work runs behind the program that orders it: there, marks are put into the stream of work, and read when the
step has been waited for anyway.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class StepTimer:
    """Seconds of the parts of one step. A part may come several times."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what happens inside to `part`."""
        start = self._mark()
        yield
        self._spans.append((part, start, self._mark()))

    def _mark(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, part: str) -> float:
        """Of all spans of a part. On a GPU, only after the device has been waited for."""
        spans = [(start, end) for name, start, end in self._spans if name == part]
        if self._is_gpu:
            return sum((start.elapsed_time(end) for start, end in spans), start=0.0) / 1000
        return sum((end - start for start, end in spans), start=0.0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use since the last call: of the GPU by torch, else of this process since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ProfileWindow:
    """A trace by `torch.profiler` over some steps, for chrome://tracing, Perfetto or TensorBoard.

    Args:
        first_step: steps done with the first one that is traced; 0 traces none.
        num_steps: how many.
        path: the file.
    """

    def __init__(self, first_step: int, num_steps: int, path: Path) -> None:
        self._first, self._last = first_step, first_step + num_steps - 1
        self._path = path
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Begins with the first step of the window, or in its middle where a resumed run does."""
        if self._first and self._profiler is None and self._first <= step <= self._last:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def after(self, step: int) -> None:
        """Writes the file after the last."""
        if self._profiler is not None and step >= self._last:
            self._profiler.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
            self._last = 0
