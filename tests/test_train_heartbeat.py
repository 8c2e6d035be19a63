"""How ranks that no longer get on are found, without any rank."""

import threading
import time
from typing import Any

from sft_fast.train.heartbeat import Heartbeats, Pulse, PulseReport, find_hang


def report(num_advances: int, still_seconds: float, **changes: Any) -> PulseReport:
    """A rank that has been at a micro-batch for some time."""
    values: dict[str, Any] = {"doing": "micro-batch 1 of step 2", "is_counted": True, "waits_for_others": False}
    return PulseReport(
        num_advances=num_advances, still_seconds=still_seconds, stack="x.py:1 in f", **(values | changes)
    )


def test_the_rank_that_is_behind_holds_the_others_up() -> None:
    """Of ranks that all stand still, the one to name has begun least; of equals, the one that waits for nobody."""
    behind = find_hang([report(7, 11.0, waits_for_others=True), report(6, 10.5)], 10.0)
    waits = find_hang([report(7, 11.0, waits_for_others=True), report(7, 11.0)], 10.0)

    assert behind is not None
    assert behind.rank == 1
    assert behind.message == "it hangs: it has been at micro-batch 1 of step 2 for 10 s"
    assert "x.py:1" in behind.stack
    assert waits is not None
    assert waits.rank == 1


def test_work_without_micro_batches_may_take_longer() -> None:
    """Loading and saving have ten times as long, and a rank that waits to be called has for ever."""
    assert find_hang([report(1, 99.0, doing="do_checkpoint", is_counted=False)], 10.0) is None
    assert find_hang([report(1, 101.0, doing="do_checkpoint", is_counted=False)], 10.0) is not None
    assert find_hang([report(1, 1e9, doing="")], 10.0) is None
    assert find_hang([report(1, 9.9), report(1, 9.9)], 10.0) is None


def test_a_rank_without_a_sign_of_life_is_hung() -> None:
    """A question that is not answered in time names its rank, and not the one that answers."""
    heartbeats = Heartbeats(lambda rank: rank, lambda rank: report(1, 0.0) if rank == 0 else None, 2, 0.2, 10.0)
    deadline = time.monotonic() + 10
    hang = None
    silent_before = []
    while hang is None and time.monotonic() < deadline:
        silent_before = heartbeats.silent(0.05)
        hang = heartbeats.check()
        time.sleep(0.01)

    assert silent_before == [1], "known before it counts as hung, so that its machine can be tried"
    assert hang is not None
    assert hang.rank == 1
    assert "not answered" in hang.message


def test_a_pulse_says_where_its_thread_stands() -> None:
    """The report has what was begun last, since when, and the place of the thread that began it."""
    pulse, go_on = Pulse(), threading.Event()

    def stand_still_here() -> None:
        pulse.advance("a long wait", is_counted=True)
        go_on.wait(10)

    thread = threading.Thread(target=stand_still_here)
    thread.start()
    time.sleep(0.1)
    found = pulse.report()
    go_on.set()
    thread.join()

    assert (found.num_advances, found.doing, found.is_counted) == (1, "a long wait", True)
    assert 0.05 < found.still_seconds < 5
    assert "stand_still_here" in found.stack
    assert not found.waits_for_others
