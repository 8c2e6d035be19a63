"""Work ahead of time in a thread: bounded, in order, with errors where they belong and a clean end."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from sft_fast.errors import TrainError

Item = TypeVar("Item")

# How often a thread that waits for the other looks whether that one is still there.
_POLL_SECONDS = 0.1


class Prefetcher(Generic[Item]):
    """Runs an iterator in a thread, at most `depth` items ahead, and hands the items on in order.

    An error in the thread is raised by the `next` that would have given the item. The thread ends with `close`, with
    this object or with the process, whichever is first; it never keeps a process from ending.

    Args:
        items: Is run in the thread; its own `close` is not called.
        depth: Items that may be ready and not taken yet; one more is in the thread's hand.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        # The thread must not know this object: it would keep it alive.
        self._thread = threading.Thread(
            target=_run, args=(items, self._queue, self._closed), name="prefetch", daemon=True
        )
        self._thread.start()
        # Also called when the interpreter ends: a daemon thread that is then still inside the extension could crash it.
        self._stop = weakref.finalize(self, _stop, self._thread, self._queue, self._closed)

    def __next__(self) -> Item:
        while not self._closed.is_set():
            try:
                kind, value = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise TrainError(
                        "the thread that prefetches is gone",
                        hint="was the process forked? then make the iterator in the new process",
                    ) from None
                continue
            if kind == "item":
                item: Item = value
                return item
            self._queue.put((kind, value))  # what ended the thread is the answer to every later call too
            if kind == "error":
                raise value
            break
        raise StopIteration

    def __iter__(self) -> Prefetcher[Item]:
        return self

    def close(self) -> None:
        """Stops the thread. Items that it had ready are dropped, and there are no more."""
        self._stop()


def _stop(thread: threading.Thread, ready: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    closed.set()
    if thread is threading.current_thread():  # the garbage collector runs in any thread
        return
    while thread.is_alive():
        # The thread may be waiting for a place in the queue.
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.01)


def _run(items: Iterator[Any], ready: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    def put(entry: tuple[str, Any]) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    end: tuple[str, Any] = ("end", None)
    try:
        for item in items:
            if not put(("item", item)):
                return
    except BaseException as error:  # whatever it is, it belongs to the thread that waits for the item
        end = ("error", error if isinstance(error, Exception) else TrainError(f"prefetching stopped: {error!r}"))
    put(end)
