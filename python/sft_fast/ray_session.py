"""The Ray cluster that a process works with: found, joined and left in one place, with errors that say what to do.

Ray is imported only where it is asked for.
"""

from __future__ import annotations

import os
import re
from typing import Any

from sft_fast.errors import ConfigError

LOCAL = "local"
"""The address that stands for this machine alone."""

# A machine that is there answers at once; Ray itself would try for minutes.
_CONNECT_SECONDS = 5.0


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to work with: the one that is given, else that of `RAY_ADDRESS`.

    Returns:
        None where there is none, or where it is `local`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    return None if address == LOCAL else address


def connect(address: str | None) -> tuple[Any, bool]:
    """Connects this process to `address`, unless it is connected to a cluster already.

    Args:
        address: `HOST:PORT`, or `auto` for the cluster that this machine is part of; None starts Ray on this machine.

    Returns:
        The module `ray`, and whether the caller has to leave the cluster (`ray.shutdown`).

    Raises:
        ConfigError: No cluster answers.
        ModuleNotFoundError: Ray is not installed.
    """
    import logging

    import ray

    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers way to everything else on the machine, which is not what work is for that a user waits for:
    # beside any other busy process it would hardly run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if address is not None:
        _probe(address)
    try:
        ray.init(
            # Without it, Ray would join whatever cluster somebody has started on this machine.
            address=LOCAL if address is None else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Only numbers and reports travel through Ray: the smallest object store will do.
            object_store_memory=80 * 2**20 if address is None else None,
        )
    except Exception as error:
        if address is None:
            raise
        raise _no_cluster(address, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return ray, True


def _probe(address: str) -> None:
    """Raises a `ConfigError` where nobody listens at a `HOST:PORT`."""
    match = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:([0-9]{1,5})", address)
    if match is None:
        if address != "auto":
            raise _no_cluster(address, "expected HOST:PORT, auto or local")
        return
    import socket

    try:
        socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from error


def _no_cluster(address: str, reason: str) -> ConfigError:
    named = "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") == address else "ray_address"
    return ConfigError(
        f"no Ray cluster answers at {address!r}: {reason}",
        code="no_cluster",
        location=named,
        hint="`ray start --head` on the first machine starts one and prints its address, `ray status` shows it; "
        f"{named}=local works on this machine alone",
    )
