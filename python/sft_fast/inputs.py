"""What `files` names → the files that are read: paths, globs, directories, Parquet files, data sets of Hugging Face."""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path

from sft_fast.errors import FileError, SftFastError
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
    """Of a JSON file, where it is."""
    name: str
    """What errors, samples and the manifest call it."""
    batches: Callable[[], Batches] | None = None
    """The rows of a table."""

    def lines(self) -> Iterator[bytes]:
        """The rows of a table as JSON Lines."""
        assert self.batches is not None
        return json_lines(self.batches())


@dataclass
class Inputs:
    """Inputs in order, and what was left aside of the directories that were named."""

    files: list[Input] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def opened(self, output_dir: str | PathLike[str]) -> Iterator[tuple[list[str], list[str]]]:
        """Paths for the engine, and the names of what is there; within it, errors have the names.

        Tables are kept as JSON Lines beside `output_dir` meanwhile.
        """
        paths: list[str] = []
        names = [file.name for file in self.files]
        try:
            with contextlib.ExitStack() as stack:
                for file in self.files:
                    if file.batches is None:
                        paths.append(file.path)
                        continue
                    spool = stack.enter_context(Spool(file.name, existing_parent(output_dir)))
                    spool.write(file.lines())
                    paths.append(fspath(spool))
                yield paths, names
        except SftFastError as error:
            error.path = dict(zip(paths, names, strict=False)).get(error.path or "", error.path)
            if any(file.name == error.path for file in self.files if file.batches or file.path != file.name):
                error.column = None  # it would count in JSON that nobody ever saw
            raise


def resolve(files: Files) -> Inputs:
    """Finds the inputs: each glob and directory in alphabetical order, the order of the arguments kept.

    Raises:
        FileError: A path does not exist, a glob matches nothing, or a directory holds no records.
    """
    inputs = Inputs()
    for path in [files] if isinstance(files, str | PathLike) else files:
        if isinstance(path, Spool):
            inputs.files.append(Input(fspath(path), path.name))
            continue
        path = fspath(path)
        if path.startswith(PREFIX):
            inputs.files.append(_dataset(path))
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


def _add_directory(directory: str, inputs: Inputs) -> None:
    """Adds the files of records that are in a directory itself."""
    num_before = len(inputs.files)
    skipped = []
    for path in sorted(Path(directory).iterdir()):
        is_record = _RECORDS.fullmatch(path.name) and path.name not in _METADATA and not path.name.startswith(".")
        if is_record and not path.is_dir():
            inputs.files.append(_file(str(path)))
        else:
            skipped.append(str(path) + "/" * path.is_dir())
    if len(inputs.files) == num_before:
        found = ", ".join(Path(path).name for path in skipped[:5]) or "nothing"
        raise FileError(
            f"expected files of records (.jsonl, .json, .ndjson, .parquet) in this directory, found {found}",
            path=directory,
            hint="files below it can be named by a glob, such as 'DIR/**/*.jsonl'",
        )
    inputs.skipped += skipped


def _file(path: str) -> Input:
    """A file, which shows in its first bytes what it is; what is no file is for the engine to refuse."""
    head = b""
    if Path(path).is_file():
        try:
            with open(path, "rb") as file:
                head = file.read(len(_PARQUET))
        except OSError as error:
            raise FileError(f"could not read: {error.strerror}", path=path) from error
        if head != _PARQUET and path.lower().endswith(".parquet"):
            raise FileError("expected a Parquet file, which begins with 'PAR1', found another", path=path)
    return Input(path, path, (lambda: parquet_batches(path)) if head == _PARQUET else None)


def _dataset(name: str) -> Input:
    return Input(name, name, lambda: dataset_batches(name))
