"""What is read besides files of JSON: directories, Parquet files, data sets of Hugging Face; and hostile ones."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

import sft_fast
from sft_fast.errors import ConfigError, FileError, InputError, SftFastError
from tests.data_helpers import PlainSample, contents, dump_lines, plain_samples, random_records

RECORDS = [{"messages": record["messages"]} for record in random_records(900, seed=8) if "messages" in record]
GOOD = {"instruction": "What is blue?", "output": "The sea."}


def tool_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """An answer that calls a tool and says nothing."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


# In a table, the arguments of every call have the fields of all.
CALLS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, tool_call("f", {"x": "1"})]},
    {"messages": [{"role": "user", "content": "b"}, tool_call("g", {"y": ["2"]}), {"role": "tool", "content": "c"}]},
    {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
]
# Shows whether a field is there, and whether it is null.
SHOWING = (
    "{% for message in messages %}{{ message.role ~ ':' }}{% if message.role == 'assistant' %}"
    "{{ message | tojson }}{% else %}{{ message.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def run(tokenizer_dir: Path, tmp_path: Path) -> Callable[..., sft_fast.Report]:
    """Preprocesses inputs into `out`."""

    def run(files: Any, **options: Any) -> sft_fast.Report:
        options = {"tokenizer": tokenizer_dir, "sequence_length": 512, "overwrite": True, **options}
        return sft_fast.preprocess(files, tmp_path / "out", **options)

    return run


def samples_of(report: sft_fast.Report) -> list[PlainSample]:
    """All samples of what was made."""
    return plain_samples(sft_fast.Dataset(report.path))


def write_parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    """Writes records as rows of a Parquet file."""
    parquet.write_table(pa.Table.from_pylist(records), path, **options)
    return path


def test_parquet_is_read_as_its_rows(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """Rows of a Parquet file become the samples of the same records as JSON, know their row, and leave nothing."""
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(dump_lines(RECORDS))
    expected = samples_of(run(lines))
    path = write_parquet(tmp_path / "rows", RECORDS, row_group_size=100)

    report = run([path, lines])

    dataset = sft_fast.Dataset(report.path)
    assert plain_samples(dataset) == expected + expected
    assert (dataset[2].source, dataset[len(RECORDS)].source) == (f"{path}:3", f"{lines}:1")
    assert {name.split("/")[0] for name in contents(tmp_path)} == {"data.jsonl", "rows", "out"}
    sft_fast.verify(report.path)


def test_parquet_is_found_by_its_rows(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """The fingerprint is of the rows: neither row groups nor compression nor columns of bytes are part of it."""
    first = run(write_parquet(tmp_path / "a.parquet", RECORDS, row_group_size=50, compression="none"))
    assert run(write_parquet(tmp_path / "b.parquet", RECORDS, compression="zstd")).fingerprint == first.fingerprint
    with_bytes = [{**record, "image": b"\xff"} for record in RECORDS]
    assert run(write_parquet(tmp_path / "c.parquet", with_bytes)).fingerprint == first.fingerprint
    assert run(write_parquet(tmp_path / "d.parquet", RECORDS[1:])).fingerprint != first.fingerprint


def test_nulls_of_tables_are_not_there(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A field that only other rows have is not there, however deep; the null content of an answer that calls stays."""
    template = tmp_path / "showing.jinja"
    template.write_text(SHOWING, "utf-8")
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(dump_lines(CALLS))
    options = {"template": str(template), "sequence_length": 2048}
    expected = samples_of(run(lines, **options))

    path = write_parquet(tmp_path / "calls.parquet", CALLS)
    assert '"y"' in json.dumps(parquet.read_table(path).to_pylist()[0])  # guard: a reader finds the field in each row
    assert samples_of(run(path, **options)) == expected
    saved = datasets.Dataset.from_list(CALLS)
    saved.save_to_disk(tmp_path / "saved")
    assert samples_of(run(tmp_path / "saved", **options)) == expected


def test_odd_columns_are_no_matter(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """Dates, numbers that are none, maps and bytes beside a record change nothing; a text may be a category."""
    table = pa.table(
        {
            "instruction": pa.array([GOOD["instruction"]] * 2).dictionary_encode(),
            "output": pa.array([GOOD["output"]] * 2, pa.large_string()),
            "date": pa.array([0, None], pa.timestamp("ns")),
            "score": [float("nan"), float("inf")],
            "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
            "image": [{"bytes": b"\xff", "path": None}] * 2,
        }
    )
    parquet.write_table(table, tmp_path / "odd.parquet")
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(dump_lines([GOOD, GOOD]))
    assert samples_of(run(tmp_path / "odd.parquet")) == samples_of(run(lines))


def test_a_wrong_row_is_named(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """The error of a row has the file and the row, and no column; skipped rows are counted and listed with them."""
    rows = [GOOD, {"instruction": "a", "output": None}, {"instruction": "a", "output": " "}, GOOD]
    path = write_parquet(tmp_path / "data.parquet", rows)

    with pytest.raises(InputError) as caught:
        run(path)
    assert (caught.value.code, caught.value.path, caught.value.line) == ("missing_key", str(path), 2)
    assert caught.value.column is None
    report = run(path, on_error="skip")
    rejected = [json.loads(line) for line in Path(report.path, "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(line["path"], line["line"], line["reason"]) for line in rejected] == [
        (str(path), 2, "missing_key"), (str(path), 3, "empty_answer"),
    ]  # fmt: skip


def test_text_of_tables_that_is_no_text(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A string of a Parquet file whose bytes are not UTF-8 is a wrong record of its row, and the others are read."""
    raw = pa.array([b"The sea.", b"\xff\xfe", b"Blue."] * 200, pa.binary())
    output = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    parquet.write_table(pa.table({"instruction": ["a"] * 600, "output": output}), tmp_path / "data.parquet")

    with pytest.raises(InputError, match="0xFF") as caught:
        run(tmp_path / "data.parquet")
    assert (caught.value.code, caught.value.line) == ("invalid_utf8", 2)
    report = run(tmp_path / "data.parquet", on_error="skip")
    assert (report.num_samples, report.rejected_by_reason) == (400, {"invalid_utf8": 200})


def test_damaged_parquet_is_one_error(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A Parquet file cut anywhere, overwritten anywhere, or of another kind is a named error that leaves nothing."""
    whole = write_parquet(tmp_path / "whole", RECORDS, row_group_size=200).read_bytes()
    path = tmp_path / "data.parquet"
    for number in range(1, 12):
        path.write_bytes(whole[: number * len(whole) // 12])
        with pytest.raises(FileError, match="Parquet") as caught:
            run(path)
        assert caught.value.path == str(path)
    for start in (4, len(whole) // 3, len(whole) - 60, len(whole) - 8):
        path.write_bytes(whole[:start] + b"\xff" * 7 + whole[start + 7 :])
        with pytest.raises((FileError, InputError)) as error:
            run(path)
        assert error.value.path == str(path)
    for other in (b"", dump_lines([GOOD]), b"PAR", b"PAR1", b"PARE" + whole[4:]):
        path.write_bytes(other)
        with pytest.raises(FileError, match="Parquet"):
            run(path)
    assert set(contents(tmp_path)) == {"whole", "data.parquet"}


def test_parquet_without_rows(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A Parquet file without a row group is no error by itself; without any record there is nothing to make."""
    empty = tmp_path / "empty.parquet"
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), empty)
    with pytest.raises(InputError) as caught:
        run(empty)
    assert caught.value.code == "no_records"
    assert run([empty, write_parquet(tmp_path / "good.parquet", [GOOD])]).num_samples == 1


def test_a_huge_string_is_refused_by_its_row(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A record of a table may be as large as one of a file, and a larger one is a wrong record of its row."""
    large = {"instruction": "a", "output": "b" * (256 << 20)}
    path = write_parquet(tmp_path / "data.parquet", [GOOD, large, GOOD])
    report = run(path, on_error="skip")
    assert (report.num_samples, report.rejected_by_reason) == (2, {"record_too_large": 1})


def test_a_directory_stands_for_its_files(
    run: Callable[..., sft_fast.Report], run_cli: Callable[..., Any], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The files of records in a directory are read in alphabetical order, whatever their form; all else is said."""
    import gzip

    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(dump_lines([{"text": "second"}])))
    (folder / "a.json").write_text(json.dumps([{"text": "first"}]), "utf-8")
    write_parquet(folder / "c.parquet", [{"text": "third"}])
    (folder / "deeper" / "d.jsonl").write_bytes(dump_lines([{"text": "not this"}]))
    for name in (".hidden.jsonl", "README.md", "dataset_infos.json"):
        (folder / name).write_text("{", "utf-8")

    report = run(folder)

    names = [Path(file["path"]).name for file in sft_fast.Dataset(report.path).manifest["files"]]
    assert names == ["a.json", "b.jsonl.gz", "c.parquet"]
    skipped = [".hidden.jsonl", "README.md", "dataset_infos.json", "deeper/"]
    assert report.skipped_files == [f"{folder}/{name}" for name in skipped]
    assert samples_of(report) == samples_of(run([folder / name for name in names]))
    result = run_cli(
        "preprocess", "folder", "--output-dir", "new", "--tokenizer", tokenizer_dir, "--sequence-length", "64",
        COLUMNS="300",
    )  # fmt: skip
    assert "4: folder/.hidden.jsonl, folder/README.md, folder/dataset_infos.json, folder/deeper/" in result.stdout


def test_hostile_directories(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """A directory without records, and what is no file in one, are errors that name them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileError, match=r"expected files of records .* found nothing") as caught:
        run(folder)
    assert caught.value.path == str(folder)
    (folder / "data.csv").write_text("a,b\n", "utf-8")
    with pytest.raises(FileError, match=r"found data\.csv"):
        run(folder)
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(FileError, match="expected a file, found a pipe"):
        run(folder)
    (folder / "pipe.jsonl").unlink()
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    with pytest.raises(FileError, match="No such file"):
        run(folder)


def test_saved_datasets(run: Callable[..., sft_fast.Report], tmp_path: Path) -> None:
    """What `save_to_disk` wrote is read by its path, rows in their order; of several splits one must be named."""
    lines = tmp_path / "data.jsonl"
    lines.write_bytes(dump_lines(RECORDS[::-1][:50]))
    expected = samples_of(run(lines))
    shuffled = datasets.Dataset.from_list(RECORDS).select(range(len(RECORDS) - 1, len(RECORDS) - 51, -1))
    shuffled.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": shuffled, "test": shuffled.select([0])})
    splits.save_to_disk(tmp_path / "two")

    report = run(tmp_path / "one")
    assert samples_of(report) == expected
    assert sft_fast.Dataset(report.path)[4].source == f"{tmp_path}/one:5"
    assert samples_of(run(f"hf:{tmp_path}/two:train")) == expected
    assert samples_of(run([f"hf:{tmp_path}/two:test"])) == expected[:1]
    with pytest.raises(FileError, match="expected one split, found train, test") as caught:
        run(tmp_path / "two")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("two:train")
    with pytest.raises(FileError, match="expected the split 'dev', found train, test"):
        run(f"hf:{tmp_path}/two:dev")


def test_datasets_by_name(run: Callable[..., sft_fast.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hf:NAME:SPLIT` is what `load_dataset` makes of it, slices included; what it can't load is one error."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(dump_lines(RECORDS[:10]))
    expected = samples_of(run(folder / "train.jsonl"))

    assert samples_of(run(f"hf:{folder}")) == expected
    assert samples_of(run(f"hf:{folder}:train[2:4]")) == expected[2:4]
    with pytest.raises(FileError, match="could not load the data set") as caught:
        run(f"hf:{tmp_path}/none:train")
    assert caught.value.path == f"hf:{tmp_path}/none:train"


@pytest.mark.parametrize(("module", "name"), [("datasets", "hf:any/name"), ("pyarrow", "data.parquet")])
def test_what_is_not_installed_is_said(
    module: str, name: str, run: Callable[..., sft_fast.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library that an input needs, the error says what to install."""
    write_parquet(tmp_path / "data.parquet", [GOOD])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        run(name)
    assert "pip install 'sft-fast[" in (caught.value.hint or "")
    assert isinstance(caught.value, SftFastError)
