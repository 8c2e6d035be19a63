"""What goes wrong in a rank, and which of several failures is the cause of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_fast.errors import SftFastError, TrainError

# Of the ends of a run, those that come from a process or a machine: what a new start may mend.
_MENDABLE = frozenset({"rank_died", "rank_failed", "rank_hung", "machine_lost"})

# What gloo, NCCL and torch say when the other side of a connection is gone.
_ECHO_SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket timeout")


@dataclass(frozen=True)
class Failure:
    """An error of a rank, as plain values that survive the way to the driver."""

    rank: int
    host: str  # with the address, where there are several machines
    kind: str  # name of the exception's class, or one of the driver's own: `died`, `hung`, `lost`
    message: str
    traceback: str
    seconds: float  # when, since 1970
    error: SftFastError | None = None  # the exception itself, where it is one of ours

    @property
    def may_be_echo(self) -> bool:
        """Whether it looks like the echo of another rank's end."""
        text = f"{self.kind} {self.message}".lower()
        is_ours = self.error is not None or self.kind in ("died", "hung", "lost")
        return not is_ours and any(sign in text for sign in _ECHO_SIGNS)


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that set the others off: the earliest of those that are no echo, or the earliest of all."""
    return min(failures, key=lambda failure: (failure.may_be_echo, failure.seconds))


def to_error(failure: Failure) -> SftFastError:
    """A failure as an exception that names rank and host. What the user can put right stays as it is."""
    if failure.error is not None and failure.error.exit_status == 2:
        return failure.error
    where = f"rank {failure.rank} on {failure.host}"
    last_lines = "\n".join(failure.traceback.strip().splitlines()[-8:])
    if failure.kind == "died":
        return TrainError(f"{where} died: {failure.message}", code="rank_died", hint=last_lines or None)
    if failure.kind == "hung":
        return TrainError(f"{where}: {failure.message}", code="rank_hung", hint=last_lines or None)
    if failure.kind == "lost":
        return TrainError(f"{where} is lost: {failure.message}", code="machine_lost", hint=last_lines or None)
    if failure.error is not None:
        return TrainError(f"{where}: {failure.error.message}", code=failure.error.code, hint=failure.error.hint)
    return TrainError(f"{where} failed: {failure.kind}: {failure.message}", code="rank_failed", hint=last_lines)


def may_be_mended(error: SftFastError) -> bool:
    """Whether the run may get further when its ranks are started again."""
    return error.code in _MENDABLE
