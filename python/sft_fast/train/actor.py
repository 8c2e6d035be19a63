"""What runs in the process of a rank: an `SFTWorker` whose errors become answers. Ray makes an actor of it.

Nothing here may import torch or DeepSpeed before the first call: they read the environment when they are imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_fast.errors import SftFastError
from sft_fast.train.failure import Failure
from sft_fast.train.heartbeat import PULSE, PulseReport
from sft_fast.train.network import hold_port, listen, use_interface_of, why_unreachable
from sft_fast.train.placement import visible_device

# A shared file system may show a new file late.
_SEE_SECONDS = 10.0


@dataclass(frozen=True)
class ActorOptions:
    """What a rank is told before anything else."""

    rank: int
    gpu: int | None  # its number on this machine
    address: str | None  # of this machine, where ranks are on several: the network to use
    directory: str  # where relative paths begin, as in the driver
    log_path: str


@dataclass(frozen=True)
class Location:
    """Where a rank runs."""

    host: str
    pid: int
    port: int  # stays free for torch to listen on
    probe_port: int  # somebody listens there until the run is initialised


class RankActor:
    """See the module."""

    def __init__(self, options: ActorOptions) -> None:
        self._rank = options.rank
        with contextlib.suppress(OSError):  # where it is not there, absolute paths still work
            os.chdir(options.directory)
        self._host = platform.node() if options.address is None else f"{platform.node()} ({options.address})"
        _send_output_to(Path(options.log_path), f"rank {options.rank} on {self._host}, process {os.getpid()}")
        # Ray is asked for no GPU and so would hide them all; which one a rank sees is said here.
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if options.gpu is None else visible_device(options.gpu)
        if options.address is not None:
            use_interface_of(options.address)
        self._worker: Any = None
        self._failure: Failure | None = None
        self._held_port, self._probe = hold_port(), listen()

    def locate(self) -> Location:
        """Where this is."""
        return Location(platform.node(), os.getpid(), self._held_port.getsockname()[1], self._probe.getsockname()[1])

    def why_unreachable(self, address: str, port: int) -> str | None:
        """Why this machine cannot reach a port of another; None if it can."""
        return why_unreachable(address, port)

    def unseen(self, paths: Mapping[str, str]) -> list[str]:
        """Of paths by what they are, what is not there on this machine."""
        deadline = time.monotonic() + _SEE_SECONDS
        while True:
            missing = [what for what, path in paths.items() if not os.path.exists(path)]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.2)

    def call(self, method: str, *arguments: Any) -> Any:
        """The answer of a worker's method, or the first `Failure` of this rank: after that nothing is tried again."""
        if self._failure is not None:
            return self._failure
        self._probe.close()
        try:
            PULSE.advance(method)
            if self._worker is None:
                from sft_fast.train.worker import SFTWorker

                self._worker = SFTWorker()
            return getattr(self._worker, method)(*arguments)
        except Exception as error:
            traceback.print_exc()  # into the log of this rank: the driver shows the first cause alone
            self._failure = Failure(
                rank=self._rank,
                host=self._host,
                kind=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
                seconds=time.time(),
                error=error if isinstance(error, SftFastError) else None,
            )
            return self._failure
        finally:
            PULSE.advance("")

    def finish_writing(self) -> None:
        """Returns when this rank writes nothing in the background; asked in a thread of its own."""
        if self._worker is not None:
            self._worker.finish_writing()

    def pulse(self) -> PulseReport:
        """What this rank is doing; asked in a thread of its own."""
        return PULSE.report()


def _send_output_to(path: Path, title: str) -> None:
    """Appends what this process and its libraries write from now on to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}", file=sys.stderr)
    faulthandler.enable()  # Ray sends the stack of a crash to the file that it opened before


def last_output(path: Path, num_lines: int = 8) -> str:
    """The end of what a rank has written since it was last started."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    starts = [number for number, line in enumerate(lines) if line.startswith("---- ")]
    return "\n".join(lines[starts[-1] + 1 if starts else 0 :][-num_lines:])
