"""What is in a directory of datasets, and how its space comes back: the functions behind `sft-fast cache`.

A dataset is removed by giving it the name of a temporary directory first, under the lock of its place: it is there and
whole, or it is gone. What a killed run or a killed removal left is removed by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from sft_fast import _core, lease
from sft_fast.errors import ConfigError, DatasetError, FileError

# How `ensure_dataset` names a dataset: by the first digits of its fingerprint.
_CACHED_NAME = re.compile(r"[0-9a-f]{32}")
_PART_NAME = re.compile(r"manifest\.json|(?:rejected|segments)\.jsonl|shard-[0-9]{5,}\.safetensors")
_LEFTOVER_NAME = re.compile(r"\.(?P<target>[0-9a-f]{32})\.(?:lock|tmp-[0-9]+|parts-[0-9a-f]{16})")

State = Literal["whole", "damaged", "other version"]


@dataclass(frozen=True, kw_only=True)
class CachedDataset:
    """A dataset in a cache directory. What a damaged manifest does not tell is `None`."""

    path: str
    state: State
    """`damaged`: opening it fails; it would be made again. Checksums are not read. `other version`: of a version of
    sft-fast that writes another format."""
    problem: str | None
    """Why it is not whole."""
    is_in_use: bool
    """Whether a process of this machine has it open, or asked for it."""
    is_ours: bool
    """Whether it may be removed: made for the cache, and nothing else in its directory."""
    num_bytes: int
    made: float
    """Seconds since 1970, as `time.time()`."""
    used: float
    """When it was made, or last asked for by a run."""
    fingerprint: str | None
    num_samples: int | None
    num_tokens: int | None
    sequence_length: int | None
    tokenizer: str | None
    template: str | None
    files: tuple[str, ...]
    """The input files, as they were given."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """A temporary directory or a lock file."""

    path: str
    num_bytes: int
    is_alive: bool
    """Whether a process is at work with it; if not, the process was killed."""


@dataclass(frozen=True, kw_only=True)
class CacheContent:
    """What is in a cache directory."""

    path: str
    datasets: tuple[CachedDataset, ...]
    """In the order of their last use, the oldest first."""
    leftovers: tuple[Leftover, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return _num_bytes(self.datasets) + _num_bytes(self.leftovers)


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What `prune_cache` removed, or would remove."""

    path: str
    is_dry_run: bool
    datasets: tuple[CachedDataset, ...]
    leftovers: tuple[Leftover, ...]
    num_freed_bytes: int
    num_kept_bytes: int
    """Bytes that are still there."""
    kept_in_use: tuple[CachedDataset, ...]
    """What should have gone, but is used or made by a process that lives."""


def list_cache(directory: str | PathLike[str]) -> CacheContent:
    """The datasets in a directory, and what killed runs left in it. Changes nothing.

    Args:
        directory: `data_cache_dir` of a configuration, or any directory that holds datasets.

    Raises:
        FileError: the directory can't be read.
    """
    root = Path(directory)
    datasets, leftovers = [], []
    for path in _entries(root):
        try:
            if _LEFTOVER_NAME.fullmatch(path.name):
                leftovers.append(_leftover(path))
            elif path.is_dir():
                datasets.append(_dataset(path))
        except FileNotFoundError:
            continue  # it was removed while we looked
        except OSError as error:
            raise _file_error("read", path, error) from error
    by_use = sorted(filter(None, datasets), key=lambda dataset: (dataset.used, dataset.path))
    return CacheContent(path=str(root), datasets=tuple(by_use), leftovers=tuple(filter(None, leftovers)))


def prune_cache(
    directory: str | PathLike[str],
    *,
    older_than_seconds: float | None = None,
    max_bytes: int | None = None,
    all_datasets: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Free space in a cache directory.

    What killed runs left and damaged datasets always go; with one of the arguments, datasets go too. Only what was made
    for the cache is removed (`CachedDataset.is_ours`), never what a process that lives makes or uses.

    Args:
        directory: `data_cache_dir` of a configuration.
        older_than_seconds: Removes what was not used for so long.
        max_bytes: Removes what was not used for longest, until the rest has no more bytes.
        all_datasets: Removes every dataset.
        dry_run: Only say what would go.

    Raises:
        FileError: Something can't be read or removed; what was removed before stays removed.
    """
    content = list_cache(directory)
    wanted = _wanted(content, older_than_seconds, max_bytes, all_datasets)
    removed: list[CachedDataset] = []
    in_use = [dataset for dataset in wanted if dataset.is_in_use]
    leftovers = [leftover for leftover in content.leftovers if not leftover.is_alive]
    if dry_run:
        removed = [dataset for dataset in wanted if not dataset.is_in_use]
    else:
        leftovers = [leftover for leftover in leftovers if _remove_leftover(leftover)]
        for dataset in wanted:
            if dataset not in in_use:
                (removed if _remove(dataset) else in_use).append(dataset)
    num_freed_bytes = _num_bytes(removed) + _num_bytes(leftovers)
    return PruneReport(
        path=content.path,
        is_dry_run=dry_run,
        datasets=tuple(removed),
        leftovers=tuple(leftovers),
        num_freed_bytes=num_freed_bytes,
        num_kept_bytes=content.num_bytes - num_freed_bytes,
        kept_in_use=tuple(in_use),
    )


def _wanted(
    content: CacheContent, older_than_seconds: float | None, max_bytes: int | None, all_datasets: bool
) -> list[CachedDataset]:
    """The datasets that are to go, whether in use or not."""
    now = time.time()
    num_bytes = _num_bytes(content.datasets)
    wanted = []
    for dataset in content.datasets:
        is_old = older_than_seconds is not None and now - dataset.used >= older_than_seconds
        if dataset.is_ours and (dataset.state == "damaged" or is_old or all_datasets):
            wanted.append(dataset)
            num_bytes -= 0 if dataset.is_in_use else dataset.num_bytes
    for dataset in content.datasets:
        if max_bytes is None or num_bytes <= max_bytes:
            break
        if dataset.is_ours and dataset not in wanted:
            wanted.append(dataset)
            num_bytes -= 0 if dataset.is_in_use else dataset.num_bytes
    return wanted


def _num_bytes(parts: Iterable[CachedDataset | Leftover]) -> int:
    return sum(part.num_bytes for part in parts)


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise _file_error(
            "read the directory",
            root,
            error,
            "name the one that holds the data sets: data_cache_dir of the configuration",
        ) from error


def _leftover(path: Path) -> Leftover | None:
    """The temporary directory or lock file at `path`; none if it is neither."""
    is_lock = path.name.endswith(".lock")
    if path.is_symlink() or not (path.is_file() if is_lock else path.is_dir()):
        return None
    is_alive = lease.is_locked(lease.lock_path(_target_of(path)))
    files = [path] if is_lock else path.rglob("*")
    return Leftover(path=str(path), num_bytes=sum(_size(file) for file in files), is_alive=is_alive)


def _target_of(leftover: Path) -> Path:
    match = _LEFTOVER_NAME.fullmatch(leftover.name)
    assert match is not None, leftover
    return leftover.with_name(match["target"])


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _dataset(path: Path) -> CachedDataset | None:
    """The dataset in a directory; none if it holds something else."""
    is_named = _CACHED_NAME.fullmatch(path.name) is not None
    try:
        names = os.listdir(path)
    except PermissionError:
        if is_named:
            raise
        return None  # somebody else's directory
    has_parts_only = all(_PART_NAME.fullmatch(name) for name in names)
    manifest: dict[str, Any] = {}
    state: State = "whole"
    problem = None
    try:
        manifest = json.loads(_core.Dataset(path).manifest())
        if is_named and not manifest["fingerprint"].startswith(path.name):
            state, problem = "damaged", f"expected a fingerprint that begins with {path.name}"
    except DatasetError as error:
        read = _read_manifest(path)
        is_dataset = read.get("format") == _core.DATASET_FORMAT
        if not (is_dataset or (is_named and has_parts_only)):
            return None
        is_other = is_dataset and read.get("format_version") not in (None, _core.FORMAT_VERSION)
        state, problem = ("other version" if is_other else "damaged"), error.message
    stats = {name: path.joinpath(name).lstat() for name in names} or {"": path.lstat()}
    times = {name: stat.st_mtime for name, stat in stats.items()}
    # A run that finds a dataset sets the time of its manifest; the other files keep the time when they were written.
    used = times.pop(lease.MANIFEST_NAME, max(times.values()))
    return CachedDataset(
        path=str(path),
        state=state,
        problem=problem,
        is_in_use=lease.is_locked(lease.lock_path(path)) or lease.is_locked(path / lease.MANIFEST_NAME, for_use=True),
        is_ours=is_named and has_parts_only and not path.is_symlink(),
        num_bytes=sum(stat.st_size for stat in stats.values()),
        made=min(times.values(), default=used),
        used=used,
        fingerprint=manifest.get("fingerprint"),
        num_samples=manifest.get("num_samples"),
        num_tokens=manifest.get("num_tokens"),
        sequence_length=manifest.get("recipe", {}).get("sequence_length"),
        tokenizer=manifest.get("tokenizer"),
        template=manifest.get("template"),
        files=tuple(file["path"] for file in manifest.get("files", [])),
    )


def _read_manifest(dataset: Path) -> dict[str, Any]:
    """A manifest that the extension refuses, for what can still be told of it."""
    manifest = dataset / lease.MANIFEST_NAME
    try:
        if not manifest.is_file() or manifest.stat().st_size > 1 << 28:
            return {}
        value = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _remove(dataset: CachedDataset) -> bool:
    """Removes a dataset; false if a process makes or uses it, or did so since it was listed."""
    path = Path(dataset.path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with lease.exclusive(path) as may_make:
            if not may_make:
                return False
            _remove_temporary(path)
            with lease.unused(path) as may_remove:
                found = _dataset(path)
                if not may_remove or found is None or (found.used, found.state) != (dataset.used, dataset.state):
                    return False
                path.rename(temporary)
                _sync(path.parent)
            shutil.rmtree(temporary)
    except FileNotFoundError:
        return False  # another process was faster
    except OSError as error:
        raise _file_error("remove", path, error) from error
    return True


def _remove_leftover(leftover: Leftover) -> bool:
    """Removes what a killed run left; false if by now another process is at work there."""
    target = _target_of(Path(leftover.path))
    try:
        with lease.exclusive(target) as may_make:
            if may_make:
                _remove_temporary(target)
            return may_make
    except OSError as error:
        raise _file_error("remove", Path(leftover.path), error) from error


def _remove_temporary(target: Path) -> None:
    """Removes the temporary directories of `target`, whose lock we hold."""
    for path in target.parent.iterdir():
        match = _LEFTOVER_NAME.fullmatch(path.name)
        if match and match["target"] == target.name and not path.is_symlink() and path.is_dir():
            shutil.rmtree(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_error(what: str, path: Path, error: OSError, hint: str | None = None) -> FileError:
    return FileError(f"could not {what}: {error.strerror or error}", path=str(path), hint=hint)


_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZE_UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `45m`, `12h`, `30d` or `2w`.

    Raises:
        ConfigError: It is something else.
    """
    return _parse(text, _DURATION_UNITS, "a duration such as 12h, 30d or 2w")


def parse_size(text: str) -> int:
    """Bytes of `500MB`, `50GB`, `1.5TB` (thousands) or `50GiB` (1024s), whatever the case; a number alone is bytes.

    Raises:
        ConfigError: It is something else.
    """
    return int(_parse(text, _SIZE_UNITS, "a size such as 500MB, 50GB or 1.5TB"))


def _parse(text: str, units: dict[str, int], expected: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    by_name = {name.lower(): factor for name, factor in units.items()}
    if match is None or match[2].lower() not in by_name:
        raise ConfigError(f"expected {expected}, found {text!r}", code="usage")
    return float(match[1]) * by_name[match[2].lower()]
