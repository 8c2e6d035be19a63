"""Records from memory: the dataset that a file of them gives, errors by number, and nothing left behind."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import FileError, InputError
from tests.data_helpers import contents, make_dataset, plain_samples, random_records

GOOD = {"instruction": "Say hello.", "output": "Hello."}


@pytest.fixture
def options(tokenizer_dir: Path) -> dict[str, Any]:
    """What `preprocess_records` needs besides records and a place."""
    return {"tokenizer": tokenizer_dir, "sequence_length": 1024, "system_key": "system", "query_key": "input"}


def test_records_become_what_their_file_becomes(tmp_path: Path, options: dict[str, Any]) -> None:
    """A list, or a generator, gives the fingerprint and the shards of a JSON Lines file of the same records."""
    records = random_records(500, seed=8)
    expected = make_dataset(tmp_path / "file", options["tokenizer"], records)

    report = sft_fast.preprocess_records(records, tmp_path / "list", **options)
    sft_fast.preprocess_records((record for record in records), tmp_path / "generator", num_threads=1, **options)

    assert (report.num_records, report.num_rejected) == (500, 0)
    for name in ("list", "generator"):
        found = sft_fast.Dataset(tmp_path / name)
        sft_fast.verify(found.path)
        assert found.fingerprint == expected.fingerprint
        assert plain_samples(found) == plain_samples(expected)
        assert [sample.source for sample in found] == [f"<records>:{number}" for number in range(1, 501)]
        assert [file["path"] for file in found.manifest["files"]] == ["<records>"]


@pytest.mark.parametrize(
    ("bad", "code", "location"),
    [
        ({"instruction": "Say hello."}, "missing_key", None),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role", "messages[0].role"),
        ({"instruction": "x", "output": float("nan")}, "invalid_json", None),
        ({"instruction": "x", "output": {"a set"}}, "wrong_type", None),
        ({("a", "tuple"): 1}, "wrong_type", None),
    ],
)
def test_errors_name_the_number_of_the_record(
    tmp_path: Path, options: dict[str, Any], bad: Any, code: str, location: str | None
) -> None:
    """A wrong record is an error with `<records>` for a file and its number, from 1, for a line; nothing is left."""
    with pytest.raises(InputError) as caught:
        sft_fast.preprocess_records([GOOD, GOOD, bad, GOOD], tmp_path / "out", **options)

    error = caught.value
    assert (error.path, error.line, error.column, error.code) == ("<records>", 3, None, code)
    assert location in (None, error.location)
    assert str(error).startswith("<records>:3: expected") or code == "invalid_json"
    assert contents(tmp_path) == {}


def test_skipped_records_are_listed_by_number(tmp_path: Path, options: dict[str, Any]) -> None:
    """With `on_error="skip"` a wrong record is counted, and listed under its number."""
    report = sft_fast.preprocess_records([GOOD, {"x": 1}, GOOD], tmp_path / "out", on_error="skip", **options)

    (rejected,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines())
    assert (report.num_records, report.num_samples, report.rejected_by_reason) == (3, 2, {"missing_key": 1})
    assert (rejected["path"], rejected["line"]) == ("<records>", 2)


def test_a_generator_that_fails_leaves_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """The exception of a generator passes through as it is, and the directory is as it was."""

    def records() -> Iterator[dict[str, Any]]:
        yield GOOD
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sft_fast.preprocess_records(records(), tmp_path / "out", **options)

    assert contents(tmp_path) == {}


def test_a_killed_process_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    """What is kept of records goes with the process, even if it is killed."""
    program = (
        "import sys, time, sft_fast\n"
        "def records():\n"
        "    for _ in range(100_000): yield {'instruction': 'x' * 100, 'output': 'y'}\n"
        "    print('kept', flush=True); time.sleep(60)\n"
        f"sft_fast.preprocess_records(records(), 'out', tokenizer={str(tokenizer_dir)!r}, sequence_length=99)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"kept\n"
        process.kill()

    deadline = time.monotonic() + 10
    while contents(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert contents(tmp_path) == {}


def test_memory_is_bounded(tmp_path: Path, options: dict[str, Any]) -> None:
    """A generator of 200 MB of records raises the peak of the process by a fraction of that."""
    text = "x y " * 2500
    records = ({"instruction": f"{number} {text}" if number else "Yes?", "output": "Yes."} for number in range(20_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    report = sft_fast.preprocess_records(records, tmp_path / "out", on_error="skip", num_threads=2, **options)

    assert report.num_bytes > 200_000_000
    assert report.rejected_by_reason == {"too_long": 19_999}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_place_that_cannot_be_written(tmp_path: Path, options: dict[str, Any]) -> None:
    """Where nothing can be kept, the error names the directory."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    blocked.chmod(0o500)
    if os.access(blocked, os.W_OK):  # root may write everywhere, but not where the kernel shows itself
        blocked = Path("/proc/self/task")

    with pytest.raises(FileError) as caught:
        sft_fast.preprocess_records([GOOD], blocked / "out", **options)

    assert caught.value.path == str(blocked)
