"""The format on disk: docs/format.md rule by rule, read and written by code that owes nothing to ours, and damaged."""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import sft_fast
from sft_fast.errors import DatasetError
from tests.data_helpers import (
    PlainSample,
    contents,
    fingerprint_of,
    make_dataset,
    plain_samples,
    random_records,
    write_dataset,
)

SAMPLES: list[PlainSample] = [
    ([5, 6, 7], [False, True, True]),
    ([8, 9], [False, True]),
    ([1] * 9, [False] * 8 + [True]),
]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A small dataset of two shards that passes every check."""
    directory = write_dataset(tmp_path / "dataset", SAMPLES, shard_sizes=[2])
    sft_fast.verify(directory)
    return directory


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of a dataset."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


@st.composite
def datasets(draw: st.DrawFn) -> tuple[list[PlainSample], int, list[int]]:
    """Samples, a vocabulary size of either width, and sizes of shards."""
    vocab_size = draw(st.sampled_from([2, 300, 65_536, 65_537, 2**32 - 1]))
    samples = []
    for ids in draw(
        st.lists(st.lists(st.integers(0, vocab_size - 1), min_size=2, max_size=20), min_size=1, max_size=9)
    ):
        mask = draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))
        samples.append((ids, [draw(st.booleans()), *mask[:-1], True]))
    first = draw(st.integers(1, len(samples)))
    return samples, vocab_size, [first] if first < len(samples) else []


@given(data=datasets())
def test_a_dataset_written_from_the_page_is_read(
    data: tuple[list[PlainSample], int, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a writer makes that knows docs/format.md alone is a whole dataset with the same samples."""
    samples, vocab_size, shard_sizes = data
    directory = tmp_path_factory.mktemp("format") / "dataset"

    write_dataset(directory, samples, vocab_size=vocab_size, shard_sizes=shard_sizes)

    sft_fast.verify(directory)
    dataset = sft_fast.Dataset(directory)
    assert plain_samples(dataset) == samples
    assert [sample.source for sample in dataset] == [f"data.jsonl:{line}" for line in range(1, len(samples) + 1)]
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in samples]


def test_a_dataset_of_ours_follows_the_page(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Plain safetensors opens our shards; tensors, types, metadata, alignment and manifest are those of the page."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [*random_records(20), {"instruction": "a"}], on_error="skip")
    expected = plain_samples(dataset)
    manifest = json.loads(Path(dataset.path, "manifest.json").read_text(encoding="utf-8"))

    [shard] = manifest["shards"]
    path = Path(dataset.path, shard["name"])
    with safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {"format": "sft-fast-shard-2"}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    num_tokens = sum(len(ids) for ids, _ in expected)
    num_mask_bytes = -(-num_tokens // 8)
    num_mask_bytes += -(2 * num_tokens + num_mask_bytes) % 4
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "sample_offsets": ("uint32", (21,)),
        "sample_records": ("uint32", (20, 2)),
        "token_ids": ("uint16", (num_tokens,)),
        "label_mask": ("uint8", (num_mask_bytes,)),
    }
    assert tensors["sample_records"].tolist() == [[0, line] for line in range(1, 21)]
    assert tensors["token_ids"].tolist() == [token for ids, _ in expected for token in ids]
    assert np.unpackbits(tensors["label_mask"], count=num_tokens, bitorder="little").astype(bool).tolist() == [
        is_label for _, mask in expected for is_label in mask
    ]
    assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (shard["num_bytes"], shard["num_samples"], shard["num_tokens"]) == (path.stat().st_size, 20, num_tokens)
    # The keys are those that the writer of the tests knows from the page, and nothing else.
    page = json.loads((write_dataset(tmp_path / "page", SAMPLES) / "manifest.json").read_text())
    assert manifest.keys() == page.keys()
    assert manifest["recipe"].keys() == page["recipe"].keys()
    assert manifest["files"][0].keys() == page["files"][0].keys()
    lengths = sorted(len(ids) for ids, _ in expected)
    assert manifest["sample_tokens"] == {
        "min": lengths[0], "p50": lengths[9], "p90": lengths[17], "p99": lengths[19], "max": lengths[19],
    }  # fmt: skip


def test_the_fingerprint_is_a_hash_of_what_decides_the_content(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The fingerprint is SHA-256 of format, version, recipe, and size and BLAKE3 of each file, as compact JSON."""
    manifest = make_dataset(tmp_path, tokenizer_dir, random_records(3)).manifest

    assert manifest["fingerprint"] == fingerprint_of(manifest)


@pytest.mark.parametrize(("vocab_size", "most_bytes"), [(300, 2.2), (70_000, 4.2)])
def test_a_token_costs_little(tmp_path: Path, vocab_size: int, most_bytes: float) -> None:
    """Samples of a few hundred tokens take at most 2.2 bytes a token with a small vocabulary, 4.2 with a large one."""
    directory = write_dataset(tmp_path / "dataset", [([1] * 250, [True] * 250)] * 400, vocab_size=vocab_size)

    sft_fast.verify(directory)
    assert (directory / "shard-00000.safetensors").stat().st_size < most_bytes * 250 * 400


def test_shards_grow(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Shard k takes at most (k + 1) 2^19 tokens and is closed no earlier than needed, whoever writes the dataset."""
    answer = "".join(chr(97 + number % 26) + " 0" for number in range(600))
    records = [{"instruction": "x", "output": answer[: 1 + number % 1200]} for number in range(4000)]
    dataset = make_dataset(tmp_path, tokenizer_dir, records, sequence_length=4096)
    made = sft_fast.Dataset.from_arrow(dataset.to_arrow(), tmp_path / "made")

    longest = dataset.manifest["sample_tokens"]["max"]
    shards = [shard["num_tokens"] for shard in dataset.manifest["shards"]]
    assert len(shards) > 1
    assert all(num_tokens <= (number + 1) << 19 for number, num_tokens in enumerate(shards))
    assert all(num_tokens > ((number + 1) << 19) - longest for number, num_tokens in enumerate(shards[:-1]))
    assert [shard["num_tokens"] for shard in made.manifest["shards"]] == shards


MANIFEST_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": lambda manifest: manifest.update(format="something else"),
    "a later version": lambda manifest: manifest.update(format_version=4),
    "a version of another type": lambda manifest: manifest.update(format_version="1"),
    "an unknown key": lambda manifest: manifest.update(more=1),
    "a missing key": lambda manifest: manifest.pop("fingerprint"),
    "a key of another type": lambda manifest: manifest.update(num_tokens="14"),
    "a negative count": lambda manifest: manifest.update(num_tokens=-1),
    "a count beyond 64 bits": lambda manifest: manifest.update(num_tokens=2**64),
    "an unknown token type": lambda manifest: manifest.update(token_type="U8"),
    "tokens of the other width": lambda manifest: manifest.update(token_type="U32"),
    "a vocabulary of the other width": lambda manifest: manifest.update(vocab_size=65_537),
    "no vocabulary": lambda manifest: manifest.update(vocab_size=0),
    "padding beyond the vocabulary": lambda manifest: manifest.update(pad_token_id=300),
    "records that do not add up": lambda manifest: manifest.update(num_records=4),
    "records of files that do not add up": lambda manifest: manifest["files"][0].update(num_records=2),
    "more records by shape than records": lambda manifest: manifest.update(records_by_shape={"text": 4}),
    "samples of files that do not add up": lambda manifest: manifest["files"][0].update(num_samples=2),
    "rejects of files that do not add up": lambda manifest: manifest["files"][0].update(num_rejected=1),
    "tokens of files that do not add up": lambda manifest: manifest["files"][0].update(num_tokens=1),
    "label tokens of files that do not add up": lambda manifest: manifest["files"][0].update(num_label_tokens=1),
    "files of no source": lambda manifest: manifest.update(sources=[]),
    "files of sources that are not there": lambda manifest: manifest["sources"][0].update(num_files=2),
    "sources of the same name": lambda manifest: manifest["sources"].append({"name": "data", "num_files": 0}),
    "rejects that do not add up": lambda manifest: manifest.update(num_rejected=1, num_records=4),
    "reasons that do not add up": lambda manifest: manifest.update(rejected_by_reason={"too_long": 1}),
    "reasons that overflow": lambda manifest: manifest.update(rejected_by_reason={"a": 2**64 - 1, "b": 1}),
    "samples that do not add up": lambda manifest: manifest["shards"].pop(),
    "samples of another shard": lambda manifest: manifest["shards"][0].update(num_samples=1),
    "samples that overflow": lambda manifest: manifest["shards"][0].update(num_samples=2**64 - 1),
    "tokens that overflow": lambda manifest: manifest["shards"][0].update(num_tokens=2**64 - 1),
    "shards in another order": lambda manifest: manifest["shards"].reverse(),
    "a shard of another size": lambda manifest: manifest["shards"][0].update(num_bytes=1),
    "a shard elsewhere": lambda manifest: manifest["shards"][0].update(name="../dataset/shard-00000.safetensors"),
    "a shard at the root": lambda manifest: manifest["shards"][0].update(name="/etc/passwd"),
    "a shard that is the directory": lambda manifest: manifest["shards"][0].update(name=""),
    "a shard that is the manifest": lambda manifest: manifest["shards"][0].update(name="manifest.json"),
    "a shard that is not there": lambda manifest: manifest["shards"][0].update(name="shard-00007.safetensors"),
}


@pytest.mark.parametrize("edit", MANIFEST_DAMAGE.values(), ids=MANIFEST_DAMAGE)
def test_a_manifest_that_breaks_a_rule_is_refused(whole: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Whatever rule of the manifest is broken, opening the dataset is a DatasetError that names a file."""
    edit_manifest(whole, edit)

    with pytest.raises(DatasetError) as caught:
        sft_fast.Dataset(whole)

    assert caught.value.path is not None
    assert caught.value.path.startswith(str(whole))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'"' + b"a" * 1000])
def test_a_manifest_that_is_something_else_is_refused(whole: Path, content: bytes) -> None:
    """A manifest that is not JSON, or not an object, or nested without end, is a DatasetError."""
    (whole / "manifest.json").write_bytes(content)

    with pytest.raises(DatasetError):
        sft_fast.Dataset(whole)


def test_a_manifest_cut_anywhere_is_refused(whole: Path) -> None:
    """A manifest that ends early, at any byte, is a DatasetError."""
    path = whole / "manifest.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DatasetError):
            sft_fast.Dataset(whole)


def test_a_flipped_bit_is_refused_or_harmless(whole: Path) -> None:
    """With any bit of any file flipped, opening, reading and verifying end in a DatasetError or in the same samples."""
    generator = random.Random(7)
    files = contents(whole)
    for name, content in files.items():
        for _ in range(200 if content else 0):
            changed = bytearray(content)
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            (whole / name).write_bytes(changed)
            try:
                dataset = sft_fast.Dataset(whole)
                samples = plain_samples(dataset)
                sft_fast.verify(whole)
            except DatasetError:
                continue
            assert samples == SAMPLES
        (whole / name).write_bytes(content)


def test_a_shard_cut_anywhere_is_refused(whole: Path) -> None:
    """A shard that ends early, at any byte, is a DatasetError, even where the manifest agrees with its size."""
    path = whole / "shard-00000.safetensors"
    content = path.read_bytes()
    # The header ends with many spaces; a few of them stand for all.
    num_header_bytes = 8 + int.from_bytes(content[:8], "little")
    spaces = range(len(content[:num_header_bytes].rstrip()) + 2, num_header_bytes - 2)
    for length in (length for length in range(len(content)) if length not in spaces):
        path.write_bytes(content[:length])
        edit_manifest(whole, lambda manifest, length=length: manifest["shards"][0].update(num_bytes=length))
        with pytest.raises(DatasetError) as caught:
            sft_fast.Dataset(whole)
        assert caught.value.path == str(path)


TENSOR_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no tokens": lambda tensors: tensors.pop("token_ids"),
    "one tensor more": lambda tensors: tensors.update(more=np.zeros(1)),
    "tokens of another type": lambda tensors: tensors.update(token_ids=tensors["token_ids"].astype(np.int16)),
    "tokens of another shape": lambda tensors: tensors.update(token_ids=tensors["token_ids"][None]),
    "a token too few": lambda tensors: tensors.update(token_ids=tensors["token_ids"][1:]),
    "a mask too short": lambda tensors: tensors.update(label_mask=tensors["label_mask"][1:]),
    "offsets that fall": lambda tensors: tensors["sample_offsets"].put(1, 9),
    "an empty sample": lambda tensors: tensors["sample_offsets"].put(1, 0),
    "offsets that begin late": lambda tensors: tensors["sample_offsets"].put(0, 1),
    "offsets that end late": lambda tensors: tensors["sample_offsets"].put(-1, 2**32 - 1),
    "records of another shape": lambda tensors: tensors.update(sample_records=tensors["sample_records"].reshape(-1)),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE.values(), ids=TENSOR_DAMAGE)
def test_a_shard_that_breaks_a_rule_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    """Whatever rule of a shard is broken, opening the dataset is a DatasetError that names the shard."""
    directory = write_dataset(tmp_path / "dataset", SAMPLES, change_tensors=damage)

    with pytest.raises(DatasetError) as caught:
        sft_fast.Dataset(directory)

    assert caught.value.path == str(directory / "shard-00000.safetensors")


LATE_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a token beyond the vocabulary": lambda tensors: tensors["token_ids"].put(0, 300),
    "a record of no file": lambda tensors: tensors["sample_records"].put(0, 1),
    "another mask": lambda tensors: tensors["label_mask"].put(0, 255),
    "a sample with nothing to learn": lambda tensors: tensors["label_mask"].fill(0),
}


@pytest.mark.parametrize("damage", LATE_DAMAGE.values(), ids=LATE_DAMAGE)
def test_verify_proves_what_opening_does_not_read(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    """Laws between single samples and the manifest are checked by verify, even where the checksums agree."""
    directory = write_dataset(tmp_path / "dataset", SAMPLES, change_tensors=damage)
    sft_fast.Dataset(directory)

    with pytest.raises(DatasetError):
        sft_fast.verify(directory)


def test_a_sample_of_no_file_is_refused(tmp_path: Path) -> None:
    """Asking for a sample whose record is in a file that the manifest lacks is a DatasetError, not a wrong source."""
    directory = write_dataset(tmp_path / "dataset", SAMPLES, change_tensors=LATE_DAMAGE["a record of no file"])
    dataset = sft_fast.Dataset(directory)

    with pytest.raises(DatasetError, match="file 1"):
        dataset[0]
    assert dataset[1].source == "data.jsonl:2"


def test_verify_counts_samples_lengths_and_rejects(whole: Path) -> None:
    """Verify compares the longest sample and the lines of rejected.jsonl with the manifest."""
    manifest = (whole / "manifest.json").read_bytes()
    edit_manifest(whole, lambda manifest: manifest["recipe"].update(sequence_length=8))
    with pytest.raises(DatasetError, match="at most 8 tokens, found 9"):
        sft_fast.verify(whole)

    (whole / "manifest.json").write_bytes(manifest)
    (whole / "rejected.jsonl").write_text("{}\n")
    with pytest.raises(DatasetError, match="expected 0 lines, found 1"):
        sft_fast.verify(whole)
    (whole / "rejected.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"rejected\.jsonl"):
        sft_fast.verify(whole)


def move_to_a_second_file(count: str, manifest: dict[str, Any]) -> None:
    """Says that one of what the first file has is of a second, which has nothing else."""
    second = {"path": "more.jsonl", "num_bytes": 1, "blake3": "0" * 64}
    [first] = manifest["files"]
    manifest["files"].append({**dict.fromkeys(first, 0), **second, count: 1})
    first[count] -= 1
    manifest["sources"][0]["num_files"] = 2
    manifest["fingerprint"] = fingerprint_of(manifest)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.update(fingerprint="1" * 64),
        lambda manifest: manifest["recipe"].update(sequence_length=1 << 21),
        lambda manifest: manifest["recipe"].update(prompt_key="question"),
        lambda manifest: manifest["files"][0].update(blake3="1" * 64),
        lambda manifest: manifest["files"][0].update(num_bytes=2),
        lambda manifest: manifest["sample_tokens"].update(p90=3),
        lambda manifest: manifest["sample_tokens"].pop("min"),
        lambda manifest: (manifest.update(num_label_tokens=5), manifest["files"][0].update(num_label_tokens=5)),
        *(partial(move_to_a_second_file, count) for count in ("num_samples", "num_tokens", "num_label_tokens")),
        lambda manifest: manifest["shards"][0].update(sha256="1" * 64),
    ],
)
def test_verify_proves_the_manifest(whole: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """What the manifest says of recipe, files and samples is proved against its fingerprint and the shards."""
    sft_fast.verify(whole)
    edit_manifest(whole, edit)
    assert plain_samples(sft_fast.Dataset(whole)) == SAMPLES

    with pytest.raises(DatasetError):
        sft_fast.verify(whole)


def test_verify_finds_every_changed_byte(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Any byte of a shard or of a list of segments that is another, more or missing is found, wherever it is."""
    directory = Path(make_dataset(tmp_path, tokenizer_dir, random_records(4)).path)
    sft_fast.verify(directory)
    for path in (directory / "shard-00000.safetensors", directory / "segments.jsonl"):
        content = path.read_bytes()
        changed = [content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in range(len(content))]
        for wrong in (*changed, content + b"\0", content[:-1], content[1:], b""):
            path.write_bytes(wrong)
            with pytest.raises(DatasetError):
                sft_fast.verify(directory)
        path.write_bytes(content)
    sft_fast.verify(directory)


def test_verify_knows_shards_apart(tmp_path: Path) -> None:
    """Shards that changed places, or come from another dataset, are found."""
    directory = write_dataset(tmp_path / "dataset", [SAMPLES[1]] * 4, shard_sizes=[2])
    other = write_dataset(tmp_path / "other", [([9, 8], [False, True])] * 4, shard_sizes=[2])
    names = [f"shard-{number:05}.safetensors" for number in range(2)]
    for first, second in ((directory / names[0], directory / names[1]), (directory / names[1], other / names[1])):
        contents_before = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents_before[1])
        second.write_bytes(contents_before[0])
        with pytest.raises(DatasetError, match="SHA-256"):
            sft_fast.verify(directory)
        first.write_bytes(contents_before[0])
        second.write_bytes(contents_before[1])
    sft_fast.verify(directory)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 99, 100, 700, 1000])
def test_quantiles_are_those_of_the_page(tmp_path: Path, num_samples: int) -> None:
    """For any number of samples the quantiles of a writer in Python, by whole numbers, are those of verify."""
    samples: list[PlainSample] = [([5] * (2 + number), [True] * (2 + number)) for number in range(num_samples)]

    sft_fast.verify(write_dataset(tmp_path / "dataset", samples))


def test_verify_proves_the_list_of_segments(whole: Path) -> None:
    """A list of segments that is damaged, or of other samples, is found by verify; opening does not need it."""
    path = whole / "segments.jsonl"
    for content in (
        '{"blake3": null, "num_samples": 4}\n',
        '{"num_samples": 5}\n',
        "x",
        '{"blake3": null, "num_samples": -1}\n',
    ):
        path.write_text(content)
        with pytest.raises(DatasetError, match="list of segments") as caught:
            sft_fast.verify(whole)
        assert caught.value.path == str(path)
        info = {"num_bytes": len(content), "sha256": hashlib.sha256(content.encode()).hexdigest()}
        edit_manifest(whole, lambda manifest, info=info: manifest.update(segments=info))
        with pytest.raises(DatasetError, match="list of segments"):
            sft_fast.verify(whole)
    path.unlink()
    with pytest.raises(DatasetError, match="list of segments"):
        sft_fast.verify(whole)
    assert plain_samples(sft_fast.Dataset(whole)) == SAMPLES


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.safetensors"])
@pytest.mark.parametrize("replace", [Path.exists, Path.mkdir, os.mkfifo], ids=["nothing", "directory", "pipe"])
def test_a_missing_file_is_named(whole: Path, name: str, replace: Callable[[Path], object]) -> None:
    """A manifest or shard that is missing, or no file, is a DatasetError at once."""
    (whole / name).unlink()
    replace(whole / name)

    with pytest.raises(DatasetError) as caught:
        sft_fast.Dataset(whole)

    assert caught.value.exit_status == 2
    assert caught.value.path in (str(whole), str(whole / name))


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    """A missing directory, an empty one and a file are DatasetErrors that say how to make a dataset."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "empty", "file"):
        with pytest.raises(DatasetError, match="found no manifest") as caught:
            sft_fast.Dataset(tmp_path / name)
        assert "sft-fast preprocess" in (caught.value.hint or "")


def test_the_page_names_tests_and_codes_that_exist() -> None:
    """Each test that docs/format.md names is there, and its codes are those of errors that are not of one record."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "format.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", page)
    for file, name in named:
        assert f"\ndef {name}(" in (root / "tests" / (file or "test_format.py")).read_text(encoding="utf-8"), name
    assert len(named) > 15

    source = (root / "rust" / "core" / "src" / "error.rs").read_text(encoding="utf-8")
    codes = dict(re.findall(r'Self::(\w+) => "(\w+)"', source))
    others = set(re.findall(r"Self::(\w+) => ErrorClass::", source)) - {"Interrupted"} | {"NoRecords"}
    listed = re.search(r"these codes besides: (.*?)\.\n", page, flags=re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == {codes[kind] for kind in others}
