"""Objects → files: in pieces, many at once, each checked for its length, and the whole by its checksum.

A journal beside the files says which pieces are there, with the checksum of each. Whoever goes on after a crash takes
these and fetches the rest; even where the power failed, a piece counts only if its bytes are there.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from sft_fast.errors import FileError
from sft_fast.objects.store import Store, file_hash
from sft_fast.objects.transfer import Transfer

PIECE_BYTES = 8 << 20
"""Bytes of a request. Small enough that little is lost where one is cut off."""
NUM_CONNECTIONS = 16
"""Requests under way at once, of the whole process: at most 128 MiB are in memory."""
JOURNAL_NAME = "pieces"


_connections = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="fetch")


def _connect_again() -> None:
    global _connections
    _connections = ThreadPoolExecutor(NUM_CONNECTIONS, thread_name_prefix="fetch")


os.register_at_fork(after_in_child=_connect_again)  # its threads have stayed with the parent


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An object that is to become a file."""

    address: str
    name: str
    """Of the file, in the directory where it comes to be."""
    num_bytes: int
    algorithm: str | None = None
    """Of the checksum: `sha256` or `md5`; None where nothing is known of the bytes."""
    checksum: str | None = None


@dataclass(frozen=True)
class _Piece:
    number: int  # of the object
    start: int
    end: int


def fetch(wanted: Sequence[Wanted], directory: Path, store: Store, transfer: Transfer) -> None:
    """Makes a file of each object in a directory; what is there already, of an earlier try, is not fetched again.

    Raises:
        FileError: An object can't be had, or its bytes are not those that were promised: `not_whole`.
        FileNotFoundError: There is no such object.
    """
    files = [_allocated(directory / one.name, one.num_bytes) for one in wanted]
    try:
        with _Journal(directory / JOURNAL_NAME) as journal:
            done = journal.read(files)
            missing = [piece for piece in _pieces(wanted) if piece not in done]
            _fetch_pieces(missing, wanted, files, store, journal)
            for number, one in enumerate(wanted):
                if not _is_right(directory, one):
                    _fetch_again(number, wanted, files, directory, store, journal, transfer)
    finally:
        for file in files:
            os.close(file)
    (directory / JOURNAL_NAME).unlink()


def _fetch_again(
    number: int, wanted: Sequence[Wanted], files: Sequence[int], directory: Path, store: Store, journal: _Journal,
    transfer: Transfer,
) -> None:  # fmt: skip
    """A wrong checksum may be of the way here: once more, and then it is of the object."""
    one = wanted[number]
    journal.forget(number)
    transfer.count(retries=1)
    _fetch_pieces([piece for piece in _pieces(wanted) if piece.number == number], wanted, files, store, journal)
    if not _is_right(directory, one):
        found = file_hash(directory / one.name, str(one.algorithm))
        journal.forget(number)
        raise FileError(
            f"expected bytes of the {one.algorithm} {one.checksum}, found {found}, twice",
            code="not_whole", path=one.address, hint="the object is damaged: write it again",
        )  # fmt: skip


def _is_right(directory: Path, one: Wanted) -> bool:
    return one.algorithm is None or file_hash(directory / one.name, one.algorithm) == one.checksum


def _pieces(wanted: Iterable[Wanted]) -> Iterator[_Piece]:
    for number, one in enumerate(wanted):
        for start in range(0, one.num_bytes, PIECE_BYTES):
            yield _Piece(number, start, min(start + PIECE_BYTES, one.num_bytes))


def _fetch_pieces(
    pieces: Sequence[_Piece], wanted: Sequence[Wanted], files: Sequence[int], store: Store, journal: _Journal
) -> None:
    def one(piece: _Piece) -> None:
        content = store.read(wanted[piece.number].address, piece.start, piece.end)
        _write(files[piece.number], content, piece.start, wanted[piece.number].address)
        journal.note(piece, zlib.crc32(content))

    futures: list[Future[None]] = [_connections.submit(one, piece) for piece in pieces]
    try:
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # nobody may write to a file that is closed


def _allocated(path: Path, num_bytes: int) -> int:
    """An open file of a size, with room on the disk."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(file, num_bytes)
        if num_bytes:
            os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.close(file)
        raise FileError(f"could not make room for {num_bytes:,} bytes: {error.strerror}", path=str(path)) from error
    return file


def _write(file: int, content: bytes, start: int, address: str) -> None:
    view = memoryview(content)
    try:
        while view:
            num_written = os.pwrite(file, view, start)
            view, start = view[num_written:], start + num_written
    except OSError as error:
        raise FileError(f"could not keep what was fetched: {error.strerror}", path=address) from error


class _Journal:
    """The pieces that are there: lines of object, first byte, end, and CRC-32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def __enter__(self) -> _Journal:
        self._file = self._path.open("a+b", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, piece: _Piece, checksum: int) -> None:
        with self._lock:
            self._file.write(b"%d %d %d %d\n" % (piece.number, piece.start, piece.end, checksum))

    def forget(self, number: int) -> None:
        """The pieces of an object are not there after all."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        self._path.write_bytes(b"".join(line for line in lines if not line.startswith(b"%d " % number)))

    def read(self, files: Sequence[int]) -> set[_Piece]:
        """The pieces whose bytes are there."""
        found = set()
        for line in self._path.read_bytes().splitlines():
            try:
                number, start, end, checksum = map(int, line.split())
                content = os.pread(files[number], end - start, start)
            except (ValueError, IndexError, OSError):
                continue  # the last line of a crash
            if zlib.crc32(content) == checksum:
                found.add(_Piece(number, start, end))
        return found
