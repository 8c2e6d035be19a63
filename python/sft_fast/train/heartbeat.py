"""Whether the ranks get on: what a rank notes of itself, and how the driver judges it.

A rank notes everything that it begins (`PULSE.advance`); a thread of its own tells the driver, who asks every few
seconds. A rank is hung in one of two ways: its process no longer answers at all, or it answers, but has begun nothing
new for longer than anything takes. In the second case all ranks stand still, since they wait for one another; the one
to name is the one that is furthest behind and does not wait for others.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# How often the driver asks.
_ASK_SECONDS = 2.0
# What has no micro-batches to count (loading, saving, exporting) may take this many times `hang_timeout`.
LONG_WORK_FACTOR = 10
# Where a rank stands when it waits for others.
_WAITING_PLACES = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class PulseReport:
    """What a rank says when it is asked."""

    num_advances: int  # things that it has begun since it started
    doing: str  # what it has begun last; empty between two calls
    is_counted: bool  # whether that is one of many alike, such as a micro-batch
    still_seconds: float  # since then
    waits_for_others: bool
    stack: str  # where it stands, innermost call last


class Pulse:
    """What this process has begun last. Written by the thread that works, read by the one that answers the driver."""

    def __init__(self) -> None:
        self._num_advances = 0
        self._doing, self._is_counted = "", False
        self._since = time.monotonic()
        self._thread = threading.get_ident()

    def advance(self, doing: str, *, is_counted: bool = False) -> None:
        """Notes that the calling thread begins something; with an empty text, that it waits to be called."""
        self._thread = threading.get_ident()
        self._doing, self._is_counted = doing, is_counted
        self._since = time.monotonic()
        self._num_advances += 1

    def report(self) -> PulseReport:
        """What there is to say now."""
        frame = sys._current_frames().get(self._thread)
        calls = traceback.extract_stack(frame) if frame is not None else []
        return PulseReport(
            num_advances=self._num_advances,
            doing=self._doing,
            is_counted=self._is_counted,
            still_seconds=time.monotonic() - self._since,
            waits_for_others=any(place in call.filename for call in calls for place in _WAITING_PLACES),
            stack="\n".join(f"{call.filename}:{call.lineno} in {call.name}" for call in calls[-6:]),
        )


# The one of this process.
PULSE = Pulse()


@dataclass(frozen=True)
class Hang:
    """A rank that no longer gets on."""

    rank: int
    message: str
    stack: str


class Heartbeats:
    """The driver's watch over all ranks.

    Args:
        ask: sends the question to a rank, and gives a reference to its answer.
        answer: the `PulseReport` behind a reference; None while there is none, or where the rank's process has ended.
        num_ranks: how many there are.
        heartbeat_timeout: seconds without an answer after which a rank counts as hung.
        hang_timeout: seconds on one micro-batch after which it counts as hung.
    """

    def __init__(
        self,
        ask: Callable[[int], Any],
        answer: Callable[[Any], PulseReport | None],
        num_ranks: int,
        heartbeat_timeout: float,
        hang_timeout: float,
    ) -> None:
        self._ask, self._answer = ask, answer
        self._heartbeat_timeout, self._hang_timeout = heartbeat_timeout, hang_timeout
        self._references: list[Any] = [None] * num_ranks
        self._asked = [0.0] * num_ranks
        self._reports: list[PulseReport | None] = [None] * num_ranks

    def start(self) -> None:
        """Forgets what was seen before: the driver has not looked for a while."""
        self._references = [None] * len(self._references)
        self._reports = [None] * len(self._reports)

    def silent(self, seconds: float) -> list[int]:
        """The ranks that have been asked so long ago and have not answered."""
        now = time.monotonic()
        return [
            rank
            for rank, reference in enumerate(self._references)
            if reference is not None and now - self._asked[rank] > seconds
        ]

    def check(self) -> Hang | None:
        """Takes the answers that are there, asks those that answered again, and judges. Returns at once."""
        now = time.monotonic()
        for rank, reference in enumerate(self._references):
            if reference is not None:
                report = self._answer(reference)
                if report is not None:
                    self._reports[rank], self._references[rank] = report, None
                elif now - self._asked[rank] > self._heartbeat_timeout:
                    last = self._reports[rank]
                    return Hang(
                        rank,
                        f"it has not answered for {now - self._asked[rank]:.0f} s: "
                        "its process is stopped, or its machine is out of reach",
                        f"last seen in:\n{last.stack}" if last is not None else "",
                    )
            elif now - self._asked[rank] > min(_ASK_SECONDS, self._heartbeat_timeout / 4):
                self._references[rank], self._asked[rank] = self._ask(rank), now
        reports = [report for report in self._reports if report is not None]
        return find_hang(reports, self._hang_timeout) if len(reports) == len(self._reports) else None


def find_hang(reports: Sequence[PulseReport], hang_timeout: float) -> Hang | None:
    """The rank that holds the others up, if one has been at the same thing for too long. `reports` is by rank."""
    is_hung = any(
        report.doing and report.still_seconds > hang_timeout * (1 if report.is_counted else LONG_WORK_FACTOR)
        for report in reports
    )
    if not is_hung:
        return None
    rank = min(range(len(reports)), key=lambda i: (reports[i].num_advances, reports[i].waits_for_others))
    report = reports[rank]
    doing = f"at {report.doing}" if report.doing else "waiting to be called"
    message = f"it hangs: it has been {doing} for {report.still_seconds:.0f} s"
    return Hang(rank, message, f"it stands in:\n{report.stack}")
