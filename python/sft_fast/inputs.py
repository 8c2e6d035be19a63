"""What `files` names → the files that are read: paths, globs, directories, tables, and what is in object storage."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path

from sft_fast import objects
from sft_fast.errors import FileError, SftFastError
from sft_fast.redact import without_secrets
from sft_fast.spool import Spool, existing_parent
from sft_fast.tables import PREFIX, Batches, dataset_batches, is_saved_dataset, json_lines, parquet_batches

Files = str | PathLike[str] | Sequence[str | PathLike[str]]

# Of a directory, files of these names are read.
_RECORDS = re.compile(r".*\.((jsonl|ndjson|json)(\.gz|\.zst)?|parquet)", re.IGNORECASE)
# What hubs and `datasets` put beside records.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_PARQUET = b"PAR1"


@dataclass(frozen=True)
class Input:
    """One input: a JSON file, which the engine reads, or a table, whose rows become JSON Lines first."""

    path: str
    """Of a JSON file, where it is: on this machine, or the address of an object."""
    name: str
    """What errors, samples and the manifest call it."""
    batches: Callable[[], Batches] | None = None
    """The rows of a table."""
    is_spool: bool = False
    """Whether its lines were made here, so that nobody knows their columns."""

    @property
    def is_remote(self) -> bool:
        """Whether it has to come to this machine, before it is known whether it is a table."""
        return objects.is_address(self.path)

    def lines(self) -> Iterator[bytes]:
        """The rows of a table as JSON Lines."""
        assert self.batches is not None
        return json_lines(self.batches())


@dataclass
class Inputs:
    """Inputs in order, and what was left aside of the directories that were named."""

    files: list[Input] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    transfer: objects.Transfer = field(default_factory=objects.Transfer)
    """What came from object storage."""

    def add(self, others: Inputs) -> None:
        """Puts others behind these."""
        self.files += others.files
        self.skipped += others.skipped
        self.transfer.add(others.transfer)

    @contextlib.contextmanager
    def opened(
        self, output_dir: str | PathLike[str], *, is_shared: bool = False
    ) -> Iterator[tuple[list[str], list[str]]]:
        """Paths for the engine, and the names of what is there; within it, errors have the names.

        Objects are in the cache of this machine meanwhile, and tables are kept as JSON Lines beside `output_dir`; if
        `is_shared`, where other machines see them.
        """
        paths: list[str] = []
        names = [file.name for file in self.files]
        files: list[Input] = []
        try:
            with contextlib.ExitStack() as stack, local_copies(self.files, self.transfer) as files:
                for file in files:
                    if file.batches is None:
                        paths.append(file.path)
                        continue
                    spool = stack.enter_context(Spool(file.name, scratch_directory(output_dir), is_shared=is_shared))
                    spool.write(file.lines())
                    paths.append(fspath(spool))
                yield paths, names
        except SftFastError as error:
            here = {file.path: file.name for file in files} | dict(zip(paths, names, strict=False))
            error.path = here.get(error.path or "", error.path)
            if any(file.name == error.path for file in files if file.batches or file.is_spool):
                error.column = None  # it would count in JSON that nobody ever saw
            raise


@contextlib.contextmanager
def local_copies(files: Sequence[Input], transfer: objects.Transfer) -> Iterator[list[Input]]:
    """The inputs as they are on this machine: objects are fetched, and stay in its cache within the context."""
    remote = [file.path for file in files if file.is_remote]
    if not remote:
        yield list(files)
        return
    from sft_fast.objects.files import fetch_files

    # The cache keeps the copies as long as this is there: to the end of the context.
    copies = dict(zip(remote, fetch_files(remote, transfer), strict=True))
    yield [_file(str(copies[file.path][0]), file.name) if file.is_remote else file for file in files]


def scratch_directory(output_dir: str | PathLike[str]) -> Path:
    """Where records may be kept meanwhile: on the disk of `output_dir`, or of the cache where that is an address."""
    if not objects.is_address(output_dir):
        return existing_parent(output_dir)
    from sft_fast.objects.cache import ObjectCache

    return ObjectCache.of_environment().made()


def resolve(files: Files) -> Inputs:
    """Finds the inputs: each glob and directory in alphabetical order, the order of the arguments kept.

    Raises:
        FileError: A path does not exist, a glob matches nothing, or a directory holds no records.
    """
    inputs = Inputs()
    for path in [files] if isinstance(files, str | PathLike) else files:
        if isinstance(path, Spool):
            inputs.files.append(Input(fspath(path), path.name, is_spool=True))
            continue
        path = objects.local_path(path)
        if path.startswith(PREFIX):
            inputs.files.append(_dataset(path))
            continue
        if objects.is_address(path):
            _add_address(path, inputs)
            continue
        found = [path] if Path(path).exists() else sorted(glob.glob(path, recursive=True))
        if not found:
            raise FileError("expected a file, a directory or a glob that matches one, found nothing", path=path)
        for name in found:
            _add(name, inputs)
    return inputs


def _add(path: str, inputs: Inputs) -> None:
    if not Path(path).is_dir():
        inputs.files.append(_file(path))
    elif is_saved_dataset(Path(path)):
        inputs.files.append(_dataset(path))
    else:
        _add_directory(path, inputs)


def _add_address(address: str, inputs: Inputs) -> None:
    """Adds what is at an address of object storage: an object, what a glob matches, or those of a directory."""
    from sft_fast.objects.files import named

    files, members, directories = named(address, inputs.transfer)
    inputs.files += [Input(file, without_secrets(file)) for file in files]
    if not files:
        entries = [(member, False) for member in members] + [(below, True) for below in directories]
        _add_members(address, sorted(entries), inputs)


def _add_directory(directory: str, inputs: Inputs) -> None:
    """Adds the files of records that are in a directory itself."""
    _add_members(directory, [(str(path), path.is_dir()) for path in sorted(Path(directory).iterdir())], inputs)


def _add_members(directory: str, members: Sequence[tuple[str, bool]], inputs: Inputs) -> None:
    """Adds those of the members of a directory, (path, whether it is a directory), that are files of records."""
    num_before = len(inputs.files)
    skipped = []
    for path, is_directory in members:
        name = path.rstrip("/").rpartition("/")[2]
        is_record = _RECORDS.fullmatch(name) and name not in _METADATA and not name.startswith(".")
        if is_record and not is_directory:
            inputs.files.append(Input(path, without_secrets(path)) if objects.is_address(path) else _file(path))
        else:
            skipped.append(path + "/" * is_directory)
    if len(inputs.files) == num_before:
        found = ", ".join(path.rstrip("/").rpartition("/")[2] for path in skipped[:5]) or "nothing"
        raise FileError(
            f"expected files of records (.jsonl, .json, .ndjson, .parquet) in this directory, found {found}",
            path=directory,
            hint="files below it can be named by a glob, such as 'DIR/**/*.jsonl'",
        )
    inputs.skipped += map(without_secrets, skipped)


def _file(path: str, name: str | None = None) -> Input:
    """A file, which shows in its first bytes what it is; what is no file is for the engine to refuse.

    Args:
        path: Where it is on this machine.
        name: What it is called; by default its path.
    """
    name, head = name or path, b""
    if Path(path).is_file():
        try:
            with open(path, "rb") as file:
                head = file.read(len(_PARQUET))
        except OSError as error:
            raise FileError(f"could not read: {error.strerror}", path=name) from error
        if head != _PARQUET and name.lower().endswith(".parquet"):
            raise FileError("expected a Parquet file, which begins with 'PAR1', found another", path=name)
    return Input(path, name, (lambda: parquet_batches(path)) if head == _PARQUET else None)


def _dataset(name: str) -> Input:
    return Input(name, name, lambda: dataset_batches(name))
