"""The laws of the data layer: what goes in comes out or is counted, the same bytes for any threads, every row whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import sft_fast
from sft_fast.errors import DatasetError, FileError, InputError, SftFastError
from sft_fast.stream import StepStream
from tests.data_helpers import contents, dump_lines, knobs, make_dataset, plain_samples, random_records

OPTIONS: dict[str, Any] = {"sequence_length": 1024, "system_key": "system", "query_key": "input"}


def messages_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a record, written down once more."""
    if "messages" in record:
        messages: list[dict[str, str]] = record["messages"]
        return messages
    user = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return [*system, {"role": "user", "content": user}, {"role": "assistant", "content": record["output"]}]


def reference_sample(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids of the text that transformers renders, and the mask by what the model would see before each answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [False] * len(encoded["input_ids"])
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
        end = len(tokenizer.apply_chat_template(messages[: index + 1], tokenize=False).rstrip("\n"))
        for token, (first, last) in enumerate(encoded["offset_mapping"]):
            mask[token] = mask[token] or (first < end and last > start)
    return encoded["input_ids"], mask


def test_samples_are_those_of_transformers(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Ids equal the tokenizer's on the text that transformers renders; the mask is the answers with their end."""
    records = random_records(150, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)

    dataset = make_dataset(tmp_path, tokenizer_dir, records)

    assert [reference_sample(tokenizer, messages_of(record)) for record in records] == plain_samples(dataset)
    assert [f"{tmp_path / 'data.jsonl'}:{line}" for line in range(1, 151)] == [sample.source for sample in dataset]


@pytest.fixture(scope="module")
def chat(tokenizer_dir: Path) -> tuple[sft_fast.ChatTemplate, Any]:
    """Our template, and the tokenizer of transformers, of the same model."""
    return sft_fast.ChatTemplate.from_pretrained(tokenizer_dir), AutoTokenizer.from_pretrained(tokenizer_dir)


@given(
    system=st.none() | st.text(max_size=20),
    turns=st.lists(st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30)), min_size=1, max_size=4),
)
def test_any_text_is_encoded_as_transformers_does(
    chat: tuple[sft_fast.ChatTemplate, Any], system: str | None, turns: list[tuple[str, str]]
) -> None:
    """Whatever characters a conversation has, text, ids and mask are those of transformers and tokenizers."""
    template, tokenizer = chat
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, answer in turns:
        assume(answer.strip())
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    ids, mask = template.encode(messages)

    assert template.render(messages)[0] == tokenizer.apply_chat_template(messages, tokenize=False)
    assert (ids.tolist(), mask.tolist()) == reference_sample(tokenizer, messages)


@pytest.mark.parametrize(
    ("fields", "system", "user"),
    [
        ({"p": "a"}, None, "a"),
        ({"p": "a", "q": "b"}, None, "a\nb"),
        ({"p": "a", "q": ""}, None, "a"),
        ({"p": "a", "q": None}, None, "a"),
        ({"p": "", "q": "b"}, None, "\nb"),
        ({"p": " a\n", "q": " b "}, None, " a\n\n b "),
        ({"p": "a", "s": "c"}, "c", "a"),
        ({"p": "a", "s": ""}, None, "a"),
        ({"p": "a", "s": None, "other": [1, {}]}, None, "a"),
        ({"p": "a", "s": " "}, " ", "a"),
        ({"p": "a", "instruction": "x", "output": "y", "input": "z", "system": "w"}, None, "a"),
    ],
)
def test_fields_become_messages(
    fields: dict[str, Any], system: str | None, user: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The user's text is prompt, newline and query; what is missing, null or empty is left out; nothing is trimmed."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": " r "}]
    keys = {"prompt_key": "p", "query_key": "q", "system_key": "s", "response_key": "r"}

    dataset = make_dataset(tmp_path, tokenizer_dir, [{**fields, "r": " r "}, {"messages": messages}], **keys)

    by_fields, by_messages = plain_samples(dataset)
    assert by_fields == by_messages


def test_bytes_do_not_depend_on_threads_or_chunks(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Every file of a dataset is the same for any number of threads and any size of chunks, rejects included."""
    records: list[Any] = random_records(400, seed=1)
    records[17] = {"instruction": "no answer"}
    records[200] = "{broken"
    found = []
    for number, (threads, chunk_bytes) in enumerate([(1, 1 << 20), (2, 1000), (8, 77)]):
        with knobs(chunk_bytes=chunk_bytes, max_shard_tokens=4000):
            dataset = make_dataset(tmp_path / str(number), tokenizer_dir, records, num_threads=threads, on_error="skip")
        files = contents(Path(dataset.path))
        assert sum(name.startswith("shard-") for name in files) > 2
        found.append(
            {name: content.replace(str(tmp_path / str(number)).encode(), b"") for name, content in files.items()}
        )

    assert found[0] == found[1] == found[2]


def test_json_lines_and_arrays_are_the_same_records(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Line ends, a byte order mark, blank lines, an array, gzip: the same samples, each led back to its line."""
    import gzip

    records = random_records(20, seed=2)
    lines = dump_lines(records)
    files = {
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n").rstrip(b"\r\n"),
        "array.json": json.dumps(records, indent=1).encode(),
        "lines.jsonl.gz": gzip.compress(lines),
    }
    expected = plain_samples(make_dataset(tmp_path / "plain", tokenizer_dir, records))
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with knobs(chunk_bytes=100):
            report = sft_fast.preprocess(path, tmp_path / f"{name}.out", tokenizer=tokenizer_dir, **OPTIONS)
        dataset = sft_fast.Dataset(report.path)
        assert expected == plain_samples(dataset), name
        text = gzip.decompress(content).decode() if name.endswith("gz") else content.decode("utf-8-sig")
        lines = text.splitlines(keepends=True)
        for sample, record in zip(dataset, records, strict=True):
            line = int(sample.source.rpartition(":")[2])
            assert json.JSONDecoder().raw_decode("".join(lines[line - 1 :]).lstrip())[0] == record, sample.source


def test_every_record_is_accounted_for(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Records in are samples out and rejects by reason; each reject is a line of rejected.jsonl with its place."""
    long = {"instruction": "x", "output": "word " * 2000}
    records = [
        *random_records(10),
        {"instruction": "a"},
        "[1",
        {"instruction": "a", "output": ""},
        long,
        "\x00",
        b"\xff",
    ]
    dataset = make_dataset(tmp_path, tokenizer_dir, records, on_error="skip")

    manifest = dataset.manifest
    expected = {"missing_key": 1, "invalid_json": 2, "empty_answer": 1, "too_long": 1, "invalid_utf8": 1}
    assert expected == manifest["rejected_by_reason"]
    assert (manifest["num_records"], manifest["num_samples"], manifest["num_rejected"]) == (16, 10, 6)
    rejected = [json.loads(line) for line in Path(dataset.path, "rejected.jsonl").read_text().splitlines()]
    reasons = ["missing_key", "invalid_json", "empty_answer", "too_long", "invalid_json", "invalid_utf8"]
    assert [(line["line"], line["reason"]) for line in rejected] == list(enumerate(reasons, start=11))


def test_too_long_can_be_cut(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Truncation keeps the first tokens of a sample and is counted; without a label left, the sample is rejected."""
    records = [{"instruction": "x", "output": "word " * 200}, {"instruction": "word " * 200, "output": "x"}]
    dataset = make_dataset(tmp_path, tokenizer_dir, records, sequence_length=64, too_long="truncate")

    assert dataset.lengths.tolist() == [64]
    assert dataset.manifest["num_truncated"] == 1
    assert dataset.manifest["rejected_by_reason"] == {"no_label_tokens": 1}


@pytest.mark.parametrize(
    ("record", "code", "column", "message"),
    [
        ('{"instruction": "a" "output": "b"}', "invalid_json", 21, "expected ',' or '}'"),
        ('{"instruction": "a"}', "missing_key", 1, "expected the key 'output'"),
        ('{"instruction": 1, "output": "b"}', "wrong_type", 17, "expected a string, found a number"),
        ('{"instruction": "a", "output": ""}', "empty_answer", 32, "found an empty text"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown_role", 24, "found 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no_answer", 14, "at least one assistant"),
        ('{"instruction": "a", "output": "\\ud800"}', "invalid_json", 33, "half of a surrogate pair"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "duplicate_key", 37, "found 'output' twice"),
        ("[" * 100_000, "invalid_json", None, "nested deeper"),
        ('{"instruction": 1e999999, "output": "b"}', "wrong_type", 17, "found a number"),
    ],
)
def test_bad_record_is_one_clear_error(
    tokenizer_dir: Path, tmp_path: Path, record: str, code: str, column: int | None, message: str
) -> None:
    """The first bad record stops the work: the error has file, line, column and reason, and nothing is left behind."""
    good = json.dumps({"instruction": "a", "output": "b"})
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good}\n\n{record}\n{good}\n", encoding="utf-8")
    before = contents(tmp_path)

    with pytest.raises(InputError) as caught:
        sft_fast.preprocess(path, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=64)

    error = caught.value
    assert (code, str(path), 3) == (error.code, error.path, error.line)
    assert message in error.message
    assert column in (None, error.column)
    assert before == contents(tmp_path)


def test_json_errors_have_pythons_places(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Line and column of broken JSON are those of Python's json, counted in characters."""
    for text in ['{"ü": "é" 1}', '{"a": tru}', '{"a": [1,, 2]}', '{"a": 1,}x', "{'a': 1}"]:
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        path = tmp_path / "data.jsonl"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as found:
            sft_fast.preprocess(path, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=64)
        assert abs(expected.value.colno - (found.value.column or 0)) <= 1, text
        assert expected.value.lineno == found.value.line


def test_what_is_no_input_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A missing file, a directory, a pipe, an empty file, a model without tokenizer: an error of ours, nothing left."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "model").mkdir()
    good = tmp_path / "good.jsonl"
    good.write_bytes(dump_lines([{"instruction": "a", "output": "b"}]))
    before = sorted(path.name for path in tmp_path.iterdir())
    for file, tokenizer in [
        ("missing.jsonl", tokenizer_dir), ("model", tokenizer_dir), ("pipe", tokenizer_dir),
        ("empty.jsonl", tokenizer_dir), ("good.jsonl", tmp_path / "model"), ("good.jsonl", tmp_path / "missing"),
    ]:  # fmt: skip
        with pytest.raises(SftFastError) as caught:
            sft_fast.preprocess(tmp_path / file, tmp_path / "out", tokenizer=tokenizer, sequence_length=64)
        assert caught.value.exit_status == 2
        assert before == sorted(path.name for path in tmp_path.iterdir()), file


def test_a_dataset_is_found_by_content(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The same bytes and settings find the dataset; others are refused unless replacing is allowed."""
    records = random_records(5)
    first = make_dataset(tmp_path, tokenizer_dir, records)
    path = tmp_path / "copy.jsonl"
    path.write_bytes(dump_lines(records))
    again = sft_fast.preprocess(path, first.path, tokenizer=tokenizer_dir, **OPTIONS)
    assert again.reused
    assert first.fingerprint == again.fingerprint

    path.write_bytes(dump_lines(records[:4]))
    with pytest.raises(DatasetError, match="another one"):
        sft_fast.preprocess(path, first.path, tokenizer=tokenizer_dir, **OPTIONS)
    changed = sft_fast.preprocess(path, first.path, tokenizer=tokenizer_dir, overwrite=True, **OPTIONS)
    assert (changed.reused, len(sft_fast.Dataset(first.path))) == (False, 4)


def test_three_processes_make_a_dataset_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Of processes that want the same dataset at once, one makes it and the others find it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(random_records(3000)))
    code = (
        f"import sft_fast; print(sft_fast.ensure_dataset({str(path)!r}, {str(tmp_path / 'cache')!r}, "
        f"tokenizer={str(tokenizer_dir)!r}, **{OPTIONS!r}).reused)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    reused = sorted(process.communicate()[0].strip() for process in processes)

    assert reused == ["False", "True", "True"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_run_leaves_the_old_state_or_the_new(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Killed at random moments, there is no dataset or a whole one; the next run succeeds and leaves nothing else."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(random_records(20_000, max_words=30)))
    out = tmp_path / "here" / "out"
    code = (
        f"import sft_fast; print('go', flush=True); sft_fast.preprocess({str(path)!r}, {str(out)!r}, "
        f"tokenizer={str(tokenizer_dir)!r}, sequence_length=1024, system_key='system', query_key='input')"
    )
    delays = random.Random(5)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delays.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            sft_fast.verify(out)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

    sft_fast.verify(out)
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_a_changed_byte_is_found(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Verify passes on a whole dataset and names the shard when one byte of its tokens changes."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(20))
    sft_fast.verify(dataset.path)
    shard = Path(dataset.path, "shard-00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)

    with pytest.raises(DatasetError, match="SHA-256"):
        sft_fast.verify(dataset.path)


def test_a_foreign_directory_is_not_touched(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A directory with other files is refused, whatever overwrite says."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises((DatasetError, FileError)):
        make_dataset(tmp_path, tokenizer_dir, random_records(2), overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def dataset(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> sft_fast.Dataset:
    """Some hundred samples."""
    return make_dataset(tmp_path_factory.mktemp("laws"), tokenizer_dir, random_records(300, seed=9, max_words=20))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_the_samples_in_their_rows(dataset: sft_fast.Dataset, packed: bool, shift: bool) -> None:
    """A batch is what a slow loop writes: ids, labels of the same sample only, positions from 0, bounds of samples."""
    make = dataset.pack if packed else dataset.rows
    packing = make(sequence_length=1024, seed=5, epoch=1)
    assert sorted(sample for row in packing for sample in row.tolist()) == list(range(len(dataset)))
    rows = [2, 0, 1]
    batch = packing.batch(rows, shift_labels=shift)

    width = batch["input_ids"].shape[1]
    assert width == (1024 if packed else max(int(dataset.lengths[packing[row]].sum()) for row in rows))
    bounds = [0]
    for row, number in enumerate(rows):
        ids, labels, positions = [], [], []
        for sample in (dataset[int(index)] for index in packing[number]):
            own = [
                int(i) if is_label else -100 for i, is_label in zip(sample.input_ids, sample.label_mask, strict=True)
            ]
            own[0] = -100
            ids += sample.input_ids.tolist()
            labels += [*own[1:], -100] if shift else own
            positions += range(len(own))
            bounds.append(row * width + len(ids))
        num_padding = width - len(ids)
        assert num_padding >= 0
        if num_padding:
            bounds.append((row + 1) * width)
        assert [*ids, *[dataset.pad_token_id] * num_padding] == batch["input_ids"][row].tolist()
        assert [*labels, *[-100] * num_padding] == batch["labels"][row].tolist()
        assert [*positions, *range(num_padding)] == batch["position_ids"][row].tolist()
    assert bounds == batch["cu_seqlens"].tolist()
    assert max(np.diff(bounds)) == batch["max_seqlen"]

    arrays = {name: np.empty_like(batch[name]) for name in ("input_ids", "labels", "position_ids")}
    packing.fill(rows, shift_labels=shift, **arrays)
    assert all((arrays[name] == batch[name]).all() for name in arrays)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_do_not_depend_on_ranks(dataset: sft_fast.Dataset, packed: bool) -> None:
    """Each sample once an epoch; step k has the same samples for any ranks and micro-batches."""
    stream = StepStream(dataset, sequence_length=512, packed=packed, seed=3, num_rows_per_step=12, num_epochs=2)
    assert stream.num_steps == 2 * stream.num_steps_per_epoch
    orders = []
    for world_size, rows_per_micro_batch in [(1, 12), (2, 3), (3, 2), (4, 1)]:
        order = []
        for step in range(stream.num_steps):
            plans = [
                stream.step(step, rank=rank, world_size=world_size, rows_per_micro_batch=rows_per_micro_batch)
                for rank in range(world_size)
            ]
            assert len({len(plan.micro_batches) for plan in plans}) == 1
            rows = sorted(row for plan in plans for micro_batch in plan.micro_batches for row in micro_batch)
            samples = sorted(int(sample) for row in rows for sample in stream.packing(plans[0].epoch)[row])
            labels = sum(
                (stream.batch(plan, index)["labels"] != -100).sum()
                for plan in plans
                for index in range(len(plan.micro_batches))
            )
            assert plans[0].num_label_tokens == labels
            assert plans[0].num_tokens == dataset.lengths[samples].sum()
            order.append(samples)
        orders.append(order)

    assert all(order == orders[0] for order in orders)
    half = stream.num_steps_per_epoch
    for epoch in (orders[0][:half], orders[0][half:]):
        assert list(range(len(dataset))) == sorted(sample for step in epoch for sample in step)
    assert orders[0][:half] != orders[0][half:]
