"""Machines of a Ray cluster, each in a network namespace of its own: one is killed, a link is cut and healed.

The namespaces are made and removed here, which needs the rights to do it (root); `make test-nodes` insists on them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from tests.data_helpers import contents, dump_lines, knobs, random_records

pytestmark = [pytest.mark.nodes, pytest.mark.ray]

NUM_MACHINES = 3
NETWORK = "10.77.0"
OPTIONS: dict[str, Any] = {"sequence_length": 128, "system_key": "system", "query_key": "input", "on_error": "skip"}
# Many small parts, so that there is a middle; the shards are those of a run of one machine with the same knob.
SHARDS = {"max_shard_tokens": 20_000}
PARTS = {"part_bytes": 60_000, **SHARDS}
RAY = str(Path(sys.executable).parent / "ray")


def ip(*words: str) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machines:
    """This machine as the head, without cores for tasks, and others behind a bridge, each with its address and link."""

    def __init__(self) -> None:
        self.name = f"sft{os.getpid() % 10_000}"
        self.address = f"{NETWORK}.1:6399"
        self.numbers: list[int] = []

    def start(self) -> None:
        """Makes the bridge and the head."""
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{NETWORK}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        self.ray(
            None, "--head", "--port=6399", "--include-dashboard=false", "--num-cpus=0", f"--node-ip-address={NETWORK}.1"
        )

    def add(self) -> int:
        """One more machine, with two cores; gives its number."""
        number = len(self.numbers) + 2
        self.numbers.append(number)
        space, link = f"{self.name}-{number}", self.link(number)
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", self.name, "up")
        ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        self.ray(space, f"--address={self.address}", "--num-cpus=2", f"--node-ip-address={NETWORK}.{number}")
        return number

    def link(self, number: int) -> str:
        """The end of a machine's cable that is in the bridge."""
        return f"{self.name}v{number}"

    def ray(self, space: str | None, *words: str) -> None:
        """Starts Ray on a machine."""
        inside = ["ip", "netns", "exec", space] if space else []
        store = f"--object-store-memory={80 * 2**20}"
        command = [*inside, RAY, "start", *words, store, "--disable-usage-stats"]
        # A machine that is cut off is given up after seconds, not after half a minute.
        quick = {
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_worker_niceness": "0",
        }
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | quick, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, number: int) -> None:
        """Ends all processes of a machine at once, as a loss of power does."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}-{number}"], check=True, capture_output=True, text=True
        )
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):  # it went with another
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        """Removes everything."""
        for number in self.numbers:
            self.kill(number)
            # A namespace lasts as long as what runs in it; its cable goes at once.
            subprocess.run(["ip", "link", "del", self.link(number)], check=False)
            subprocess.run(["ip", "netns", "del", f"{self.name}-{number}"], check=False)
        # Not `ray stop`, which would also stop clusters of others on this machine.
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if f"{NETWORK}.1".encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        subprocess.run(["ip", "link", "del", self.name], check=False)
        # Where Ray notes the cluster of this machine, for whoever looks for one.
        note = Path("/tmp/ray/ray_current_cluster")
        if note.is_file() and note.read_text() == self.address:
            note.unlink()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """The machines of all tests of this file."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        assert "SFT_FAST_REQUIRE_NODES" not in os.environ, "make test-nodes needs root and the command ip"
        pytest.skip("network namespaces need root and the command ip")
    machines = Machines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # nobody else is in the network
        try:
            machines.start()
            for _ in range(NUM_MACHINES):
                machines.add()
            yield machines
        finally:
            machines.stop()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a while."""
    path = tmp_path_factory.mktemp("records") / "data.jsonl"
    path.write_bytes(dump_lines(random_records(3000, max_words=60)) * 16)
    return path


@pytest.fixture(scope="module")
def expected(records: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine makes of them."""
    out = tmp_path_factory.mktemp("one") / "out"
    with knobs(**SHARDS):
        sft_fast.preprocess(records, out, tokenizer=tokenizer_dir, ray_address="local", **OPTIONS)
    return contents(out)


def test_a_killed_machine_costs_its_parts_only(
    machines: Machines, records: Path, expected: dict[str, bytes], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A machine that loses its power in the middle costs what it was at: the bytes are those of one machine."""
    lost = machines.add()
    killed: list[float] = []

    def kill(progress: Any) -> None:
        if progress.num_records > 1000 and not killed:
            machines.kill(lost)
            killed.append(time.monotonic())

    with knobs(**PARTS):
        sft_fast.preprocess(
            records, tmp_path / "out", tokenizer=tokenizer_dir, ray_address=machines.address, progress=kill, **OPTIONS
        )
    assert killed
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("seconds", [0.5, 1e9], ids=["healed before it is noticed", "noticed"])
def test_a_link_that_is_cut(
    machines: Machines, records: Path, expected: dict[str, bytes], tokenizer_dir: Path, tmp_path: Path, seconds: float
) -> None:
    """A machine out of reach for a while, noticed or not, changes nothing of what is made."""
    link = machines.link(machines.numbers[0])
    cut: list[float] = []
    healed: list[float] = []

    def cut_and_heal(progress: Any) -> None:
        if progress.num_records > 1000 and not cut:
            ip("link", "set", link, "down")
            cut.append(time.monotonic())
        if cut and not healed and time.monotonic() - cut[0] > seconds:
            ip("link", "set", link, "up")
            healed.append(time.monotonic())

    try:
        with knobs(**PARTS):
            sft_fast.preprocess(
                records,
                tmp_path / "out",
                tokenizer=tokenizer_dir,
                ray_address=machines.address,
                progress=cut_and_heal,
                **OPTIONS,
            )
    finally:
        ip("link", "set", link, "up")
    assert cut
    assert bool(healed) == (seconds < 1)
    assert contents(tmp_path / "out") == expected
