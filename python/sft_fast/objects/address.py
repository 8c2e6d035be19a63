"""What is an address of object storage, and what is a path of this machine."""

from __future__ import annotations

import re
from os import PathLike, fspath

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOCAL = re.compile(r"file://(?=/)", re.IGNORECASE)


def is_address(path: str | PathLike[str]) -> bool:
    """Whether a path is an address such as `s3://bucket/name`, and not one of this machine."""
    return isinstance(path, str) and bool(_SCHEME.match(path)) and not _LOCAL.match(path)


def local_path(path: str | PathLike[str]) -> str:
    """The path of this machine that `file:///path` stands for; any other as it is."""
    return _LOCAL.sub("", fspath(path))


def joined(address: str, *names: str) -> str:
    """The address of something below another."""
    return "/".join((address.rstrip("/"), *names))
