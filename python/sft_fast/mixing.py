"""Sources: what the entries of `file_name` say, and how much of each source an epoch uses.

Which samples an epoch takes is decided in `rust/core/src/mix.rs`; here are the names, weights and caps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import PurePath
from typing import Any

from sft_fast import _core
from sft_fast.errors import ConfigError
from sft_fast.redact import without_query

Path = str | PathLike[str]
Files = Path | Mapping[str, Any] | Sequence[Path | Mapping[str, Any]]
"""A path, a glob, a mapping with `path` and perhaps `name`, `weight` and `max_samples`, or a list of them."""

MAX_WEIGHT = 1000.0
_MILLION = 1_000_000
_KEYS = ("path", "name", "weight", "max_samples")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that go by one name, and how much of them an epoch uses.

    Weight and cap belong to the plan of an epoch and never to the tokens: changing them encodes nothing anew.

    Examples:
        >>> [source] = sft_fast.Dataset("out", [sft_fast.Source(name="all", weight=2.5)]).sources
        >>> source.num_samples, source.num_samples_per_epoch
        (3, 8)
    """

    name: str
    num_files: int = 1
    """Files of the source: successive ones of the manifest."""
    weight: float = 1.0
    """How often an epoch uses a sample, to a millionth; each is used the floor or the ceiling of it times."""
    max_samples: int | None = None
    """Samples that are used at all, the same in every epoch; None: all."""
    num_records: int = 0
    num_samples: int = 0
    num_rejected: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0

    @property
    def num_samples_per_epoch(self) -> int:
        """Samples of an epoch, each counted as often as it is used."""
        return self._taken()[1]

    @property
    def is_whole(self) -> bool:
        """Whether an epoch uses each sample once."""
        return self.weight == 1 and self._taken()[0] == self.num_samples

    @property
    def is_steady(self) -> bool:
        """Whether all epochs use the same samples."""
        return self._taken()[2]

    @property
    def share(self) -> tuple[int, int, int | None]:
        """Number of files, weight in millionths, most samples: what decides the plan."""
        return self.num_files, round(self.weight * _MILLION), self.max_samples

    def _taken(self) -> tuple[int, int, bool]:
        return _core.samples_taken(self.num_samples, *self.share[1:])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a list of files, before it is known which files there are."""

    paths: list[Path]
    name: str
    weight: float = 1.0
    max_samples: int | None = None


def read_entries(files: Files, location: str = "file_name") -> list[Entry]:
    """What the entries say; each is a source.

    A source that has no name is called as its file, without the directory and the endings.

    Args:
        files: As they are in a configuration.
        location: What errors call them.

    Raises:
        ConfigError: There is no entry, one has a key or value that can't be, or two have the same name.

    Examples:
        >>> from sft_fast.mixing import read_entries
        >>> [first, second] = read_entries(["web.jsonl", {"path": "data/math-*.jsonl.gz", "weight": 2}])
        >>> first.name, second.name, second.weight
        ('web', 'math', 2.0)
    """
    listed = [files] if isinstance(files, str | PathLike | Mapping) else files
    if not listed:
        raise ConfigError("expected at least one input file, found none", code="missing_key", location=location)
    is_list = listed is files
    entries: list[Entry] = []
    given = {entry["name"] for entry in listed if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)}
    for number, value in enumerate(listed):
        place = f"{location}[{number}]" if is_list else location
        entry = _entry(value, place)
        if isinstance(value, Mapping) and value.get("name") is not None:
            if any(entry.name == other.name for other in entries):
                raise ConfigError(f'two sources are called "{entry.name}"', code="duplicate", location=f"{place}.name")
        else:
            taken = given | {other.name for other in entries}
            suffixes = ("", *(f"-{suffix}" for suffix in range(2, len(listed) + 2)))
            entry = replace(entry, name=next(entry.name + end for end in suffixes if entry.name + end not in taken))
        entries.append(entry)
    return entries


def _entry(value: Path | Mapping[str, Any], location: str) -> Entry:
    if isinstance(value, str | PathLike):
        return Entry(paths=[value], name=_default_name(value))
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"expected a path or a group with `path`, found {value!r}", code="wrong_type", location=location
        )
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise ConfigError(
            f'unknown key "{unknown[0]}"', code="unknown_key", location=location, hint=f"known are {', '.join(_KEYS)}"
        )

    def refuse(key: str, expected: str) -> ConfigError:
        found = value.get(key)
        return ConfigError(
            f"expected {expected}, found {found!r}",
            code="missing_key" if found is None else "wrong_type",
            location=f"{location}.{key}",
        )

    paths = value.get("path")
    paths = [paths] if isinstance(paths, str | PathLike) else paths
    if not isinstance(paths, list | tuple) or not paths or not all(isinstance(path, str | PathLike) for path in paths):
        raise refuse("path", "a path, a glob or a list of them")
    name, weight, max_samples = value.get("name"), value.get("weight"), value.get("max_samples")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[^\s/]+", name)):
        raise refuse("name", "a text without spaces and slashes")
    if weight is not None:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not is_number or not (weight == 0 or 1 / _MILLION <= weight <= MAX_WEIGHT):
            raise refuse("weight", f"0 or a number from 0.000001 to {MAX_WEIGHT:g}")
    if max_samples is not None and not (type(max_samples) is int and 1 <= max_samples < 2**63):
        raise refuse("max_samples", "a whole number at least 1")
    return Entry(
        paths=list(paths),
        name=name or _default_name(paths[0]),
        weight=1.0 if weight is None else float(weight),
        max_samples=max_samples,
    )


def _default_name(path: Path) -> str:
    """A name for a file: without its directory and endings, or, of a glob, what its text says besides."""
    is_path = isinstance(path, str | PurePath)
    text = (
        without_query(fspath(path)) if is_path else str(getattr(path, "name", "data"))
    )  # of records in memory: what they are called
    parts = [re.sub(r"(\.(jsonl|json|gz|zst|zstd|parquet|csv|arrow))+$", "", part) for part in text.split("/")]
    named = (re.sub(r"\[.*?\]|[*?]", "", part).strip(" -_.") for part in reversed(parts))
    return re.sub(r"\s+", "-", next((part for part in named if part), "data"))


def describe(manifest: Mapping[str, Any], sources: Sequence[Source] | None = None) -> tuple[Source, ...]:
    """The sources of a manifest with their counts: those that it names, or `sources`.

    Raises:
        ConfigError: `sources` are of another number of files.
    """
    if sources is None:
        sources = [Source(name=source["name"], num_files=source["num_files"]) for source in manifest["sources"]]
    num_files = sum(source.num_files for source in sources)
    if num_files != len(manifest["files"]):
        raise ConfigError(f"expected sources of {len(manifest['files'])} files, found sources of {num_files}")
    files = iter(manifest["files"])
    described = []
    for source in sources:
        own = [next(files) for _ in range(source.num_files)]
        counts = {key: sum(file[key] for file in own) for key in _COUNTS}
        described.append(replace(source, **counts))
    return tuple(described)


_COUNTS = ("num_records", "num_samples", "num_rejected", "num_tokens", "num_label_tokens")


def shares(sources: Iterable[Source]) -> list[tuple[int, int, int | None]] | None:
    """What decides which samples an epoch uses; None where it is each sample once."""
    sources = list(sources)
    return None if all(source.is_whole for source in sources) else [source.share for source in sources]
