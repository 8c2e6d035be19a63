"""Preprocessing on a Ray cluster: parts of the input are encoded, and shards written, wherever there are cores.

The core cuts the input and says what each shard holds (`rust/core/src/preprocess/parts.rs`); here this work finds its
machines. Each piece of it is an ordinary task: it waits for no other, and its file appears on shared storage under its
name when it is whole. So a machine that is lost costs what it was at, and a task that was started twice does no harm.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import uuid
from dataclasses import dataclass
from typing import Any

from sft_fast import _core
from sft_fast.errors import ClusterError, ConfigError, FileError, SftFastError
from sft_fast.ray_session import connect

MAX_ATTEMPTS = 4
"""How often a task is tried, on whatever machines, before the work is given up."""

# More threads of one process gain little; a large machine takes several tasks at a time.
_MAX_THREADS = 8

# A machine that does not end a task by then is out of reach.
_STOP_SECONDS = 10.0


@dataclass
class _Task:
    """What is under way."""

    number: int
    name: str
    task: str
    num_attempts: int


class RayExecutor:
    """Has the work of `preprocess` done by tasks of a Ray cluster. The methods are called by `_core.preprocess`.

    The cluster is joined when there is work for it, and left by `close`.

    Args:
        address: Of the cluster; see `ray_session.connect`.
        num_threads: Threads of a task; by default as many as the smallest machine has cores, and 8 at most.
    """

    def __init__(self, address: str, num_threads: int | None = None) -> None:
        self._address = address
        self._ray: Any = None
        self._has_joined = False
        self._wanted_threads = num_threads
        self._tasks: dict[Any, _Task] = {}
        self._arguments: tuple[str, ...] = ()
        self._num_slots = 0
        self._remote: Any = None
        self.num_tasks_by_host: dict[str, int] = {}
        """Tasks that each machine did."""

    def begin(self, directory: str, tokenizer: str, template: str, template_date: str) -> None:
        """Joins the cluster, and takes note of what all tasks have in common.

        Raises:
            ConfigError: No cluster answers, or Ray is not installed.
        """
        try:
            self._ray, self._has_joined = connect(self._address)
        except ModuleNotFoundError as error:
            raise ConfigError(
                "a Ray cluster needs the package ray", code="missing_package", hint="pip install 'sft-fast[ray]'"
            ) from error
        self._arguments = (str(directory), str(tokenizer), template, template_date)
        self._look_around()

    def submit(self, number: int, name: str, task: str) -> None:
        """Starts a task; `name` is for messages."""
        self._start(_Task(number, name, task, 0))

    def poll(self) -> tuple[list[tuple[int, str]], int]:
        """The tasks that were finished since, with what they returned, and how many more may be submitted.

        Raises:
            ClusterError: A task failed too often.
            SftFastError: Another machine is not set up as this one.
        """
        finished: list[tuple[int, str]] = []
        if self._tasks:
            ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
            for reference in ready:
                task = self._tasks.pop(reference)
                result = self._finish(reference, task)
                if result is not None:
                    finished.append((task.number, result))
        if finished or not self._num_slots:
            self._look_around()
        # One task waits for each that is under way, so that no machine has to wait for us.
        return finished, max(0, 2 * self._num_slots - len(self._tasks))

    def stop(self) -> None:
        """Gives up what is under way, and waits until it has ended."""
        references, self._tasks = list(self._tasks), {}
        for reference in references:
            self._ray.cancel(reference, force=True)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=_STOP_SECONDS)

    def close(self) -> None:
        """Gives up what is under way, and leaves the cluster."""
        self.stop()
        if self._has_joined:
            self._ray.shutdown()
            self._has_joined = False

    def _look_around(self) -> None:
        """Counts how many tasks the machines that are there have cores for."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        cores = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        cores = [number for number in cores if number]
        num_cores = min([*cores, _MAX_THREADS])
        if self._remote is None and cores:
            self._num_threads = self._wanted_threads or num_cores
            options = {"num_cpus": min(num_cores, self._num_threads), "max_retries": 0}
            self._remote = self._ray.remote(**options)(run_task)
        self._num_slots = sum(number // min(num_cores, self._num_threads) for number in cores) if cores else 0

    def _start(self, task: _Task) -> None:
        reference = self._remote.remote(task.task, *self._arguments, self._num_threads)
        self._tasks[reference] = task

    def _finish(self, reference: Any, task: _Task) -> str | None:
        """What a task that has ended returned; if it did not do its work, it is started again."""
        try:
            host, result = self._ray.get(reference)
        except self._ray.exceptions.RayError as lost:
            # The process or its machine is gone. What it was at is all that has to be done again.
            host, result = (
                None,
                ClusterError(
                    f"{task.name} was not made, in {task.num_attempts + 1} attempts: {_first_line(lost)}",
                    hint="`ray status` shows the machines that are left; what is done is kept, so run again when they "
                    "are back. A process that is killed again and again has too little memory: fewer num_threads",
                ),
            )
        if isinstance(result, str):
            self.num_tasks_by_host[host] = self.num_tasks_by_host.get(host, 0) + 1
            return result
        task.num_attempts += 1
        # Storage may fail one machine and not another; what is wrong with the configuration is wrong everywhere.
        if not isinstance(result, ClusterError | FileError) or task.num_attempts >= MAX_ATTEMPTS:
            if host is not None:
                result.hint = "\n".join(filter(None, [result.hint, f"found on the machine {host}"]))
            raise result
        print(f"{task.name} is made again: {_first_line(result)}", file=sys.stderr)
        self._start(task)
        return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def run_task(
    task: str, directory: str, tokenizer: str, template: str, template_date: str, num_threads: int
) -> tuple[str, str | SftFastError]:
    """Encodes a part or writes a shard; what a task of Ray runs.

    Returns:
        Name of this machine, and what came of it or went wrong.
    """
    unique = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        return platform.node(), _runner(tokenizer, template, template_date).run(task, directory, num_threads, unique)
    except SftFastError as error:
        return platform.node(), error


@functools.lru_cache(maxsize=1)
def _runner(tokenizer: str, template: str, template_date: str) -> _core.TaskRunner:
    """With the model of the parts that this process encodes: loaded once, however many they are."""
    return _core.TaskRunner(tokenizer, template, template_date)
