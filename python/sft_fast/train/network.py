"""Ports, interfaces, and whether a machine answers."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from sft_fast.train.placement import Machine

# A machine of a cluster answers in milliseconds; one that is cut off never does.
_ANSWER_SECONDS = 5.0


def free_port() -> int:
    """A port of this machine that nobody listens on, for use at once."""
    with hold_port() as held:
        return int(held.getsockname()[1])


def hold_port() -> socket.socket:
    """A port that is given to nobody else while the socket is open, but that this machine may still listen on.

    Between the choice of a port and its use lies the import of torch: time enough for another process to be given it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def listen() -> socket.socket:
    """A port of this machine that takes connections, by either version of the protocol where there are two."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def why_unreachable(address: str, port: int, timeout: float = _ANSWER_SECONDS) -> str | None:
    """Why nothing answers at a port of a machine, in the system's words; None where something does."""
    try:
        socket.create_connection((address, port), timeout=timeout).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def answering(machines: Iterable[Machine]) -> list[Machine]:
    """Those whose Ray answers, in their order. Ray itself takes up to a minute to give up a machine."""
    machines = list(machines)
    others = [machine for machine in machines if not machine.is_ours]
    with ThreadPoolExecutor(max_workers=min(64, len(others) or 1)) as pool:
        reasons = pool.map(lambda machine: why_unreachable(machine.address, machine.port), others)
        lost = {machine.node_id for machine, reason in zip(others, reasons, strict=True) if reason is not None}
    return [machine for machine in machines if machine.node_id not in lost]


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address; None where none has."""
    import psutil

    wanted = ipaddress.ip_address(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                found = ipaddress.ip_address(entry.address.partition("%")[0])
                if found == wanted:
                    return str(name)
    return None


def use_interface_of(address: str) -> None:
    """Has gloo and NCCL use the network that Ray uses, unless the environment of this process names another.

    Left to themselves they take the first that they find, or the one of the host's name: often a bridge of containers,
    or an address that no other machine can reach.
    """
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # exactly this one: eth1 is not eth10
