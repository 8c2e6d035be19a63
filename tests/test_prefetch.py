"""The thread that works ahead: in order, bounded, with its errors handed on, and gone when it should be."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sft_fast.errors import TrainError
from sft_fast.prefetch import Prefetcher


def test_prefetching_keeps_the_order() -> None:
    """Items come out as they went in, and then there are no more, however often one asks."""
    prefetcher = Prefetcher(iter(range(50)), depth=3)

    assert list(prefetcher) == list(range(50))
    assert list(prefetcher) == []


def test_prefetching_is_bounded() -> None:
    """The thread runs ahead by the depth (and the item in its hand) and no further."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    prefetcher = Prefetcher(items(), depth=4)
    try:
        deadline = time.monotonic() + 5
        while len(taken) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(taken) == 5
    finally:
        prefetcher.close()


def test_an_error_comes_out_where_its_item_would() -> None:
    """What went right before the error is still handed on; the error is raised in the thread that waits."""

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken row")

    prefetcher = Prefetcher(items(), depth=2)

    assert next(prefetcher) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="broken row"):
            next(prefetcher)


def test_closing_ends_the_thread() -> None:
    """A prefetcher that is closed half way leaves no thread behind."""
    before = threading.active_count()
    prefetcher = Prefetcher(iter(itertools.count()), depth=2)
    next(prefetcher)
    prefetcher.close()

    assert threading.active_count() == before
    prefetcher.close()


def test_a_closed_prefetcher_has_no_more() -> None:
    """Asked after it was closed, it says that there is nothing, instead of waiting for ever."""
    prefetcher = Prefetcher(iter(itertools.count()), depth=2)
    prefetcher.close()

    assert list(prefetcher) == []


def test_a_forgotten_prefetcher_ends_its_thread() -> None:
    """A prefetcher that nobody holds any more, in a cycle or not, takes its thread with it."""
    before = threading.active_count()
    prefetcher = Prefetcher(iter(itertools.count()), depth=2)
    cycle = [prefetcher]
    cycle.append(cycle)  # type: ignore[arg-type]
    del prefetcher, cycle
    gc.collect()

    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "threading.Thread(target=next, args=(p,)).start()"])
def test_a_process_ends_with_a_prefetcher_at_work(end: str) -> None:
    """A process that never closes its prefetcher, busy in the extension or waiting for a place, still ends well."""
    code = f"""
import itertools, sys, threading
from sft_fast.prefetch import Prefetcher
from sft_fast import _core
def work():
    for number in itertools.count():
        yield _core.total_steps(number, 1.0)
p = Prefetcher(work(), depth=3)
q = Prefetcher(iter(int, 1), depth=1000)
next(p), next(q)
{end}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_told() -> None:
    """In a forked process there is no thread: asking there is an error, not an endless wait."""
    waiting = threading.Event()

    def items() -> Iterator[int]:
        waiting.wait()
        yield 1

    prefetcher = Prefetcher(items(), depth=1)
    child = os.fork()
    if child == 0:
        try:
            next(prefetcher)
        except TrainError as error:
            os._exit(7 if "forked" in (error.hint or "") else 8)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    waiting.set()

    assert os.waitstatus_to_exitcode(status) == 7
    assert list(prefetcher) == [1]
