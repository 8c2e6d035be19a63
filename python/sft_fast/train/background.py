"""A checkpoint that is written while training goes on: a copy of the state in memory, and a thread that writes it.

The copy is taken between two steps, which holds the rank for as long as copying takes; what is slow, the disk, is left
to the thread. One write is under way at a time, so that a rank never holds more than one copy.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class WriteReport:
    """What a rank tells the driver of a write that is done."""

    seconds: float  # from the copy to the last byte on the disk
    waited_seconds: float  # for which the rank stood still until it was done


class BackgroundWriter:
    """The thread of one rank that writes a checkpoint."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._seconds = self._waited_seconds = 0.0

    def start(self, write: Callable[[], None]) -> None:
        """Begins to write; the write before must have been finished with `wait`."""
        assert self._thread is None or not self._thread.is_alive(), "one write at a time"
        self._error, self._waited_seconds = None, 0.0
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            write()
        except Exception as error:  # told by `finish`, in the thread that the driver hears
            self._error = error
        self._seconds = time.perf_counter() - start

    def finish(self, wait: bool) -> WriteReport | None:
        """The report of the last write, as often as it is asked for; None while it is under way.

        Args:
            wait: to stand still until it is done.

        Raises:
            Exception: what went wrong in writing.
        """
        assert self._thread is not None, "nothing was written"
        if self._thread.is_alive():
            if not wait:
                return None
            start = time.perf_counter()
            self._thread.join()
            self._waited_seconds = time.perf_counter() - start
        if self._error is not None:
            raise self._error
        return WriteReport(self._seconds, self._waited_seconds)

    def join(self) -> None:
        """Waits until nothing is being written, whatever becomes of it. Any thread may call it, at any time."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Waits as `join`, and forgets what was written."""
        self.join()
        self._thread = None


def copy_to_host(value: Any) -> Any:
    """A copy of nested dictionaries and lists with all their tensors in CPU memory; what shares memory still does.

    From a GPU the tensors are copied behind what it is doing, to page-locked memory; returns when they are there.
    """
    copied = _copy(value, {})
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(value: Any, seen: dict[Any, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        key = (
            *(value.device, value.untyped_storage().data_ptr(), value.storage_offset()),
            *(value.shape, value.stride(), value.dtype),
        )
        if key not in seen:
            seen[key] = _copy_tensor(value.detach())
        return seen[key]
    if type(value) in (dict, OrderedDict):
        copied = type(value)((key, _copy(inner, seen)) for key, inner in value.items())
        if isinstance(value, OrderedDict):
            copied.__dict__.update(value.__dict__)  # the versions of a state_dict's modules
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copy(inner, seen) for inner in value)
    return copy.deepcopy(value)


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
