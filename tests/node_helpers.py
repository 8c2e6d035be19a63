"""Machines of a Ray cluster, each in a network namespace with an address of its own: to be killed, and cut off.

The namespaces are made and removed here, which needs the rights to do it (root); `make test-nodes` insists on them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NETWORK = "10.77.0"
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
        self._gone: set[int] = set()

    @property
    def alive(self) -> list[int]:
        """Those that have neither been killed nor cut off for good."""
        return [number for number in self.numbers if number not in self._gone]

    def have(self, num_machines: int) -> None:
        """Adds machines until so many are alive."""
        while len(self.alive) < num_machines:
            self.add()

    def address_of(self, number: int) -> str:
        """The address of a machine."""
        return f"{NETWORK}.{number}"

    def cut(self, number: int) -> None:
        """Pulls the cable of a machine, for good."""
        self._gone.add(number)
        ip("link", "set", self.link(number), "down")

    def start(self) -> None:
        """Makes the bridge and the head."""
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{NETWORK}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        self.ray(
            None, "--head", "--port=6399", "--include-dashboard=false", "--num-cpus=0", f"--node-ip-address={NETWORK}.1"
        )

    def add(self, private: Path | None = None) -> int:
        """One more machine, with two cores; gives its number. A `private` directory has other contents on it."""
        number = len(self.numbers) + 2
        self.numbers.append(number)
        space, link = self.space(number), self.link(number)
        ip("netns", "add", space)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", self.name, "up")
        ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        address = f"--node-ip-address={NETWORK}.{number}"
        self.ray(space, f"--address={self.address}", "--num-cpus=2", address, private=private)
        return number

    def space(self, number: int) -> str:
        """The network namespace of a machine."""
        return f"{self.name}-{number}"

    def link(self, number: int) -> str:
        """The end of a machine's cable that is in the bridge."""
        return f"{self.name}v{number}"

    def ray(self, space: str | None, *words: str, private: Path | None = None) -> None:
        """Starts Ray on a machine."""
        inside = ["ip", "netns", "exec", space] if space else []
        if private is not None:
            inside += ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(private)]
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
        self._gone.add(number)
        listed = subprocess.run(["ip", "netns", "pids", self.space(number)], check=True, capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):  # it went with another
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        """Removes everything."""
        for number in self.numbers:
            self.kill(number)
            # A namespace lasts as long as what runs in it; its cable goes at once.
            subprocess.run(["ip", "link", "del", self.link(number)], check=False)
            subprocess.run(["ip", "netns", "del", self.space(number)], check=False)
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


@contextlib.contextmanager
def machines_here(num_machines: int) -> Iterator[Machines]:
    """So many machines besides the head; skips the test where they can't be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        assert "SFT_FAST_REQUIRE_NODES" not in os.environ, "make test-nodes needs root and the command ip"
        pytest.skip("network namespaces need root and the command ip")
    machines = Machines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # nobody else is in the network
        try:
            machines.start()
            for _ in range(num_machines):
                machines.add()
            yield machines
        finally:
            machines.stop()
