"""Where a dataset goes and when it is made: work that is done is found, and what is not ours is left alone."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import DatasetError, FileError, InputError
from tests.conftest import CHAT_TEMPLATE, make_tokenizer_dir
from tests.data_helpers import contents, dump_lines, knobs, make_dataset, plain_samples, random_records

RECORDS = random_records(20, seed=8)


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    """A file with a few good records."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(RECORDS))
    return path


@pytest.fixture
def run(input_file: Path, tokenizer_dir: Path, tmp_path: Path) -> Callable[..., sft_fast.Report]:
    """Preprocesses that file into `out` beside it, with any option changed."""

    def run(**changes: Any) -> sft_fast.Report:
        options = {
            "files": input_file, "output_dir": tmp_path / "out", "tokenizer": tokenizer_dir, "sequence_length": 1024,
            "system_key": "system", "query_key": "input", **changes,
        }  # fmt: skip
        return sft_fast.preprocess(**options)

    return run


Run = Callable[..., sft_fast.Report]


def times(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of a directory and all in it."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in [directory, *directory.rglob("*")]}


def test_the_same_work_is_not_done_again(run: Run, tmp_path: Path) -> None:
    """The same input and settings again touch nothing, and report the same."""
    first = run()
    before = times(tmp_path)

    again = run(num_threads=1, on_error="skip")

    assert times(tmp_path) == before
    assert (first.reused, again.reused) == (False, True)
    differs = {"reused", "seconds", "num_reused_samples"}
    assert {name: value for name, value in vars(again).items() if name not in differs} == {
        name: value for name, value in vars(first).items() if name not in differs
    }


def test_what_decides_the_content_decides_the_fingerprint(
    run: Run, input_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Whatever can change a sample changes the fingerprint; what can't, such as paths and threads, does not."""
    copy = tmp_path / "copy.jsonl"
    shutil.copy(input_file, copy)
    one, rest = tmp_path / "one.jsonl", tmp_path / "rest.jsonl"
    one.write_bytes(dump_lines(RECORDS[:1]))
    rest.write_bytes(dump_lines(RECORDS[1:]))
    model = shutil.copytree(tokenizer_dir, tmp_path / "model")
    other_template = make_tokenizer_dir(tmp_path / "other_template", CHAT_TEMPLATE + "{# another text #}")
    other_tokenizer = shutil.copytree(tokenizer_dir, tmp_path / "other_tokenizer")
    (other_tokenizer / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text() + "\n")

    def fingerprint(**changes: Any) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return run(on_error="skip", **changes).fingerprint

    first = fingerprint()
    same = [
        fingerprint(files=[copy]), fingerprint(tokenizer=model), fingerprint(num_threads=3),
        fingerprint(files=str(tmp_path / "copy*")), fingerprint(template="native"),
    ]  # fmt: skip
    with knobs(chunk_bytes=64):
        same.append(fingerprint())
    others = [
        fingerprint(files=[one, rest]), fingerprint(files=[rest, one]), fingerprint(files=[input_file, input_file]),
        fingerprint(sequence_length=1023), fingerprint(too_long="truncate"),
        fingerprint(control_tokens="allow"), fingerprint(train_on="last_answer"),
        fingerprint(train_on_tool_calls=False), fingerprint(train_on_thinking=False),
        fingerprint(dropped_thinking="split"), fingerprint(too_long="truncate_turns"),
        fingerprint(system_key=None),
        fingerprint(query_key=None), fingerprint(query_key="x"), fingerprint(prompt_key="output"),
        fingerprint(response_key="instruction"), fingerprint(template="chatml"),
        fingerprint(tokenizer=other_template), fingerprint(tokenizer=other_tokenizer),
    ]  # fmt: skip

    assert set(same) == {first}
    assert len({first, *others}) == len(others) + 1


def test_a_changed_byte_is_other_work(run: Run, input_file: Path, tmp_path: Path) -> None:
    """One changed byte of the input: the dataset is refused and stays, or is replaced if that is allowed."""
    run()
    before = contents(tmp_path / "out")
    input_file.write_bytes(input_file.read_bytes().replace(b"a", b"e", 1))

    with pytest.raises(DatasetError, match="found another one") as caught:
        run()
    assert "--overwrite" in (caught.value.hint or "")
    assert contents(tmp_path / "out") == before

    assert not run(overwrite=True).reused
    assert contents(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_skipped_records_are_not_forgiven(run: Run, input_file: Path, tmp_path: Path) -> None:
    """A dataset that was made with on_error="skip" is no answer to "raise": the wrong record is raised as ever."""
    input_file.write_bytes(dump_lines([*RECORDS, "{"]))
    assert run(on_error="skip").num_rejected == 1
    before = contents(tmp_path)

    with pytest.raises(InputError, match="invalid JSON") as caught:
        run()

    assert caught.value.line == len(RECORDS) + 1
    assert contents(tmp_path) == before
    assert run(on_error="skip").reused


def test_left_out_by_policy_is_no_error(run: Run, input_file: Path) -> None:
    """Records that are too long or teach nothing are counted, not raised, and such a dataset is used again."""
    input_file.write_bytes(dump_lines([*RECORDS, {"instruction": "a", "output": "b" * 5000}]))

    first, again = run(), run()

    assert first.rejected_by_reason == again.rejected_by_reason == {"too_long": 1}
    assert again.reused


@pytest.mark.parametrize("damage", ["manifest.json", "shard-00000.safetensors"])
def test_a_damaged_dataset_is_refused_or_replaced(run: Run, tmp_path: Path, damage: str) -> None:
    """A damaged dataset is refused with what to do, and replaced if that is allowed."""
    expected = plain_samples(sft_fast.Dataset(run().path))
    path = tmp_path / "out" / damage
    path.write_bytes(path.read_bytes()[:-1] if damage.startswith("shard") else b"{")

    with pytest.raises(DatasetError) as caught:
        run()
    assert "--overwrite" in (caught.value.hint or "")

    assert not run(overwrite=True).reused
    assert plain_samples(sft_fast.Dataset(tmp_path / "out")) == expected


def test_the_cache_mends_itself(input_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A cache holds a dataset for each fingerprint, finds it, and makes a damaged one again."""
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "system_key": "system", "query_key": "input"}

    def ensure(sequence_length: int) -> sft_fast.Report:
        return sft_fast.ensure_dataset(input_file, tmp_path / "cache", sequence_length=sequence_length, **options)

    first, second = ensure(1024), ensure(512)
    assert Path(first.path).parent == Path(second.path).parent == tmp_path / "cache"
    assert first.fingerprint.startswith(Path(first.path).name)
    assert (ensure(1024).reused, ensure(512).reused) == (True, True)

    (Path(first.path) / "shard-00000.safetensors").unlink()
    assert (ensure(1024).reused, ensure(1024).reused) == (False, True)
    sft_fast.verify(first.path)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"manifest.json": '{"name": "a browser extension"}'},
        {"manifest.json": "[]", "icon.png": ""},
        {"shard-00000.safetensors": "mine"},
        {"rejected.jsonl": ""},
        {".hidden": ""},
    ],
)
def test_what_is_no_dataset_is_never_touched(run: Run, tmp_path: Path, files: dict[str, str], overwrite: bool) -> None:
    """A directory that holds no dataset of ours is refused and stays as it is, whatever overwrite says."""
    (tmp_path / "out").mkdir()
    for name, content in files.items():
        (tmp_path / "out" / name).write_text(content)
    before = contents(tmp_path)

    with pytest.raises(DatasetError, match="other files") as caught:
        run(overwrite=overwrite)

    assert caught.value.path == str(tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_dataset_with_a_stranger_is_used_but_not_removed(run: Run, input_file: Path, tmp_path: Path) -> None:
    """A file of the user's in a dataset's directory keeps the dataset from being replaced, not from being used."""
    run()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run().reused

    input_file.write_bytes(dump_lines(RECORDS[:3]))
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match=r"found 'notes\.txt' in it"):
        run(overwrite=True)
    assert contents(tmp_path) == before


def test_a_dataset_may_go_to_many_places(run: Run, tmp_path: Path) -> None:
    """A new directory, an empty one, one below others that are missing, a link, a relative path: all are good."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    expected = contents(Path(run().path))
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        for place in ("empty", "a/b/c", "link", "relative", "trailing/", "./dot/.", "a/../up", "ünïcödé 漢", "-x"):
            assert not run(output_dir=place).reused
            assert contents(Path(place)) == expected
            assert run(output_dir=place).reused
    finally:
        os.chdir(here)

    assert (tmp_path / "link").is_symlink()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_litter_of_the_dead_is_removed(run: Run, tmp_path: Path) -> None:
    """What a killed run left beside the dataset is removed by the next run; what only looks like it stays."""
    (tmp_path / ".out.tmp-12345").mkdir()
    (tmp_path / ".out.tmp-12345" / "shard-00000.safetensors").write_text("half")
    (tmp_path / ".out.lock").touch()
    (tmp_path / ".out.tmp-mine").mkdir()
    (tmp_path / ".outer.tmp-1").mkdir()

    run()

    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp-mine", ".outer.tmp-1", "data.jsonl", "out"]


def test_failed_work_leaves_no_directories(run: Run, input_file: Path, tmp_path: Path) -> None:
    """Directories above the output that were made for work that fails are removed again."""
    input_file.write_text("{")

    with pytest.raises(InputError):
        run(output_dir=tmp_path / "a" / "b" / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_input_that_changes_is_refused(run: Run, input_file: Path, tmp_path: Path) -> None:
    """Input that grows while it is read is an error, and nothing is left: the dataset would not be of its content."""

    def append(progress: Any) -> None:
        with input_file.open("ab") as file:
            file.write(b"\n")

    with pytest.raises(FileError, match="changed while it was read") as caught:
        run(progress=append)

    assert caught.value.path == str(input_file)
    assert list(tmp_path.iterdir()) == [input_file]


def test_progress_counts_up_to_the_report(run: Run, input_file: Path) -> None:
    """Progress never goes back, ends at the numbers of the report, and knows the whole from the start."""
    input_file.write_bytes(dump_lines(random_records(3000)))
    seen = []
    with knobs(chunk_bytes=1000):
        report = run(progress=lambda progress: seen.append(progress))

    encoding = [progress for progress in seen if not progress.is_hashing]
    for before, after in itertools.pairwise(encoding):
        assert before.num_bytes <= after.num_bytes
        assert before.num_records <= after.num_records
        assert before.num_tokens <= after.num_tokens
    last = encoding[-1]
    assert {progress.num_total_bytes for progress in seen} == {report.num_bytes}
    assert (last.num_bytes, last.num_records, last.num_rejected, last.num_tokens) == (
        report.num_bytes, report.num_records, report.num_rejected, report.num_tokens,
    )  # fmt: skip


def test_an_exception_of_progress_stops_the_work(run: Run, tmp_path: Path) -> None:
    """What the progress callback raises comes out as it is, and nothing is left."""
    error = LookupError("enough")

    def stop(progress: Any) -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        run(progress=stop)

    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_waiting_for_another_process_can_be_stopped(run: Run, tmp_path: Path) -> None:
    """A run that waits for the lock of another calls progress and ends by Ctrl-C at once; the other keeps its lock."""
    lock = tmp_path / ".out.lock"
    calls = []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run(progress=calls.append)
        timer.join()
        assert lock.exists()

    assert len(calls) >= 2
    assert not run().reused
    assert not lock.exists()


def test_several_files_are_one_input(run: Run, tmp_path: Path) -> None:
    """Paths and globs are read in the order given, globs sorted; each sample leads back to its own file and line."""
    for name, records in {"b-1": RECORDS[:3], "b-2": RECORDS[3:5], "a": RECORDS[5:6]}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(dump_lines(records))

    report = run(files=[tmp_path / "b-*.jsonl", str(tmp_path / "a.jsonl")])

    dataset = sft_fast.Dataset(report.path)
    assert [sample.source.removeprefix(f"{tmp_path}/") for sample in dataset] == [
        "b-1.jsonl:1", "b-1.jsonl:2", "b-1.jsonl:3", "b-2.jsonl:1", "b-2.jsonl:2", "a.jsonl:1",
    ]  # fmt: skip
    assert [file["num_records"] for file in dataset.manifest["files"]] == [3, 2, 1]


def test_bytes_do_not_depend_on_how_files_are_cut(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Several files, several shards, lines of any length: every byte is the same for any threads and chunks."""
    records: list[Any] = random_records(150, seed=3, max_words=60)
    records[40] = "{"
    paths = []
    for number, part in enumerate([records[:1], records[1:100], [], records[100:]]):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(dump_lines(part).rstrip(b"\n"))
        paths.append(path)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(records[:30], indent=1))
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "sequence_length": 512, "on_error": "skip"}

    found = []
    for num_threads, chunk_bytes in [(1, 1 << 20), (1, 16), (2, 97), (2, 4096), (8, 16), (8, 1000)]:
        with knobs(chunk_bytes=chunk_bytes, max_shard_tokens=2000):
            report = sft_fast.preprocess(
                [*paths, array], tmp_path / "out", num_threads=num_threads, overwrite=True, **options
            )
        assert not report.reused
        found.append(contents(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")

    assert sum(name.startswith("shard-") for name in found[0]) > 3
    assert all(files == found[0] for files in found)


def test_encode_is_what_the_dataset_holds(tokenizer_dir: Path, tmp_path: Path) -> None:
    """ChatTemplate encodes a conversation to the ids and mask of its sample; its spans are the bytes of answers."""
    records = [record for record in random_records(60, seed=6) if "messages" in record]
    template = sft_fast.ChatTemplate.from_pretrained(tokenizer_dir)

    dataset = make_dataset(tmp_path, tokenizer_dir, records)

    assert len(records) > 10
    for record, (ids, mask) in zip(records, plain_samples(dataset), strict=True):
        found_ids, found_mask = template.encode(record["messages"])
        assert (found_ids.tolist(), found_mask.tolist()) == (ids, mask)
        text, spans = template.render(record["messages"])
        trained = [text.encode()[start:end].decode() for start, end in spans]
        answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        assert trained == [f"{answer}<|im_end|>" for answer in answers]
