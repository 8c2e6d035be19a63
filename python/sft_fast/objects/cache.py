"""Copies of objects on this machine: each whole and checked, all together within a limit, shared by all processes.

An entry is a directory that comes to be by one rename, named by what decides its content. Who uses it holds a shared
lock, and is safe from those who need room: they remove what was used longest ago and is not in use. All processes agree
by locks that end with the process that holds them, so a killed one is in nobody's way.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sft_fast import lease
from sft_fast.cache import parse_size
from sft_fast.errors import ConfigError, FileError
from sft_fast.redact import without_secrets

DIRECTORY_VARIABLE = "SFT_FAST_OBJECT_CACHE"
SIZE_VARIABLE = "SFT_FAST_OBJECT_CACHE_BYTES"
DEFAULT_SIZE = "100GB"

CONTENT_NAME = "content"
"""In an entry: the files themselves."""
_NOTE_NAME = "entry.json"  # what the entry is; the lock of those who use it is on this file
_RESERVED_NAME = "reserved"  # in an entry that comes to be: how many bytes it will have
_ENTRY = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"\.(?P<key>[0-9a-f]{32})\.part")
_TRASH = re.compile(r"\.[0-9a-f]{32}\.trash-(?P<process>[0-9]+)")
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Held:
    """An entry that stays as long as this object lives."""

    path: Path
    """The directory of its files."""
    use: lease.Use
    was_there: bool


class ObjectCache:
    """A directory of entries.

    Args:
        directory: On a disk of this machine.
        max_bytes: Of all entries together, those that come to be included.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    @classmethod
    def of_environment(cls) -> ObjectCache:
        """The cache that the environment names.

        Raises:
            ConfigError: The limit is no size.
        """
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        directory = os.environ.get(DIRECTORY_VARIABLE) or os.path.join(home, "sft-fast", "objects")
        try:
            max_bytes = parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE)
        except ConfigError as error:
            error.location = SIZE_VARIABLE
            raise
        return cls(Path(directory).absolute(), max_bytes)

    def get(self, key: str, num_bytes: int, address: str, fill: Callable[[Path], None]) -> Held:
        """The entry of a key: the one that is there, or a new one.

        Of several processes that want the same entry at once, one fills it and the others wait.

        Args:
            key: 32 hexadecimal digits, which decide the content.
            num_bytes: Of the files of the entry.
            address: What it is a copy of, for its note and for errors.
            fill: Makes the files in a directory, which may hold what an earlier call had made before it failed.

        Raises:
            FileError: There is no room (`cache_full`), or the directory can't be used.
        """
        target = self.directory / key
        is_made = False
        while True:
            held = self._hold(target, not is_made)
            if held is not None:
                return held
            with self._naming_errors(), lease.exclusive(target) as may_make:
                is_made = may_make and not target.exists()
                if is_made:
                    part = self._reserve(key, num_bytes, address)
                    content = part / CONTENT_NAME
                    content.mkdir(exist_ok=True)
                    fill(content)
                    self._publish(part, target, num_bytes, address)
            if not is_made:
                time.sleep(_POLL_SECONDS)  # another process makes it, or still uses one that is damaged

    def adopt(self, key: str, directory: Path, num_bytes: int, address: str) -> None:
        """Makes an entry of a directory on the same disk, which is gone then; does nothing where there is one.

        Raises:
            FileError: There is no room: `cache_full`.
        """
        target = self.directory / key
        with self._naming_errors(), lease.exclusive(target) as may_make:
            if may_make and not target.exists():
                part = self._reserve(key, num_bytes, address)
                shutil.rmtree(part / CONTENT_NAME, ignore_errors=True)
                directory.rename(part / CONTENT_NAME)
                self._publish(part, target, num_bytes, address)

    def holding(self, name: str) -> list[Held]:
        """The entries that have a file of this name. To look at them is no use that keeps them for longer than this."""
        try:
            paths = [path for path in sorted(self.directory.iterdir()) if _ENTRY.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        paths = [path for path in paths if (path / CONTENT_NAME / name).is_file()]
        uses = [(path, lease.Use(path, _NOTE_NAME)) for path in paths]
        return [Held(path / CONTENT_NAME, use, True) for path, use in uses if use.is_held]

    def made(self) -> Path:
        """The directory, which is there now.

        Raises:
            FileError: It can't be made.
        """
        with self._naming_errors():
            return self.directory

    def check_room(self, num_bytes: int, address: str) -> None:
        """Raises a `FileError` for what could never be an entry."""
        if num_bytes > self.max_bytes:
            raise self._full(num_bytes, address, 0)

    def num_bytes(self) -> int:
        """Bytes of all entries, and of those that come to be."""
        return sum(num_bytes for _, num_bytes, _ in self._entries())

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            yield
        except FileNotFoundError:
            raise  # of the object: who asked for it knows what that means
        except FileError:
            raise
        except OSError as error:
            raise FileError(
                f"could not keep a copy here: {error.strerror or error}", path=str(self.directory),
                hint=f"{DIRECTORY_VARIABLE} names another directory",
            ) from error  # fmt: skip

    def _hold(self, target: Path, was_there: bool) -> Held | None:
        use = lease.Use(target, _NOTE_NAME)
        if not use.is_held:
            return None
        try:
            note = json.loads((target / _NOTE_NAME).read_bytes())
            is_whole = note["files"] == _sizes(target / CONTENT_NAME)
        except (OSError, ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:  # somebody changed a file
            del use
            self._remove(target)
            return None
        os.utime(target / _NOTE_NAME)
        return Held(target / CONTENT_NAME, use, was_there)

    def _publish(self, part: Path, target: Path, num_bytes: int, address: str) -> None:
        note = {"address": without_secrets(address), "num_bytes": num_bytes, "files": _sizes(part / CONTENT_NAME)}
        with (part / _NOTE_NAME).open("w", encoding="utf-8") as file:
            json.dump(note, file)
            file.flush()
            os.fsync(file.fileno())
        (part / _RESERVED_NAME).unlink()
        part.rename(target)

    def _reserve(self, key: str, num_bytes: int, address: str) -> Path:
        """Room for an entry whose lock we hold; its directory."""
        self.check_room(num_bytes, address)
        part = self.directory / f".{key}.part"
        with self._locked():
            self._empty_trash()
            others = [entry for entry in self._entries() if entry[0] != part]
            num_free_bytes = self.max_bytes - sum(size for _, size, _ in others)
            for path, size, _ in sorted(others, key=lambda entry: entry[2]):
                if num_free_bytes >= num_bytes:
                    break
                if self._remove(path):
                    num_free_bytes += size
            if num_free_bytes < num_bytes:
                raise self._full(num_bytes, address, self.max_bytes - num_free_bytes)
            part.mkdir(exist_ok=True)
            (part / _RESERVED_NAME).write_text(str(num_bytes), encoding="utf-8")
        return part

    def _full(self, num_bytes: int, address: str, num_used_bytes: int) -> FileError:
        used = f", of which {num_used_bytes:,} are in use" if num_used_bytes else ""
        return FileError(
            f"expected room for {num_bytes:,} bytes in the cache {self.directory}, found a limit of "
            f"{self.max_bytes:,}{used}",
            code="cache_full", path=address, hint=f"{SIZE_VARIABLE}=500GB raises the limit, if the disk has the room",
        )  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The right to give and take room. Held for moments only."""
        descriptor = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _entries(self) -> list[tuple[Path, int, float]]:
        """(path, bytes, last use) of each entry, those that come to be included."""
        found = []
        try:
            paths = sorted(self.directory.iterdir())
        except FileNotFoundError:
            return []
        for path in paths:
            try:
                if _ENTRY.fullmatch(path.name):
                    note = path / _NOTE_NAME
                    found.append((path, int(json.loads(note.read_bytes())["num_bytes"]), note.stat().st_mtime))
                elif _PART.fullmatch(path.name):
                    reserved = path / _RESERVED_NAME
                    found.append((path, int(reserved.read_text(encoding="utf-8") or 0), reserved.stat().st_mtime))
            except (OSError, ValueError, KeyError, TypeError):
                # Made or removed this moment, or by nobody of us: the first thing to go.
                found.append((path, sum(size for _, size in _walk(path)), 0.0))
        return found

    def _remove(self, path: Path) -> bool:
        """Removes an entry, or one that a killed process left half-made; false where it is in use."""
        part = _PART.fullmatch(path.name)
        key = part["key"] if part else path.name
        with lease.exclusive(self.directory / key) as may_make:
            if not may_make:
                return False
            trash = self.directory / f".{key}.trash-{os.getpid()}"
            try:
                if part:
                    path.rename(trash)
                else:
                    with lease.unused(path, _NOTE_NAME) as may_remove:
                        if not may_remove:
                            return False
                        path.rename(trash)
            except FileNotFoundError:
                return True
        shutil.rmtree(trash, ignore_errors=True)
        return True

    def _empty_trash(self) -> None:
        for path in self.directory.iterdir():
            if _TRASH.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _walk(directory: Path) -> Iterator[tuple[str, int]]:
    """Each file below a directory by its relative path, and its bytes; passes over what is removed meanwhile."""
    for root, _, names in os.walk(directory):
        for name in names:
            path = Path(root, name)
            try:
                yield str(path.relative_to(directory)), path.stat().st_size
            except FileNotFoundError:
                continue


def _sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file below a directory."""
    return dict(_walk(directory))
