"""What the tests of the data layer share: records, datasets made of them, and a writer of datasets of its own."""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save_file

from sft_fast import Dataset, data, preprocess

# Token ids and label mask of a sample.
PlainSample = tuple[list[int], list[bool]]

WORDS = (
    "What is the capital of France Paris Add two and three five sea wide blue never still poem ü 漢字 🙂 \n \t 'quoted'"
)


def random_text(random: random.Random, num_words: int) -> str:
    """Words, some of them beyond ASCII."""
    return " ".join(random.choice(WORDS.split(" ")) for _ in range(num_words)) + "."


def random_record(random: random.Random, max_words: int = 12) -> dict[str, Any]:
    """A good record, of fields or of messages."""

    def text() -> str:
        return random_text(random, random.randint(1, max_words))

    if random.random() < 0.6:
        record = {"instruction": text(), "input": random.choice(["", text()]), "output": text()}
        return record if random.random() < 0.5 else {"system": text(), **record}
    roles = ["system"] * random.randint(0, 1) + ["user", "assistant"] * random.randint(1, 3)
    return {"messages": [{"role": role, "content": text()} for role in roles]}


def random_records(num_records: int, seed: int = 0, max_words: int = 12) -> list[dict[str, Any]]:
    """Good records."""
    generator = random.Random(seed)
    return [random_record(generator, max_words) for _ in range(num_records)]


def dump_lines(records: Sequence[Any]) -> bytes:
    """Records as JSON Lines; a record that is a text or bytes is taken as it is."""
    lines = (record if isinstance(record, str | bytes) else json.dumps(record) for record in records)
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)


def make_dataset(directory: Path, tokenizer: Path, records: Sequence[Any], **options: Any) -> Dataset:
    """The dataset that `preprocess` makes of records in a file `data.jsonl`, both in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "data.jsonl"
    path.write_bytes(dump_lines(records))
    defaults = {"tokenizer": tokenizer, "sequence_length": 1024, "system_key": "system", "query_key": "input"}
    return Dataset(preprocess(path, directory / "out", **{**defaults, **options}).path)


@contextmanager
def knobs(**private: int) -> Iterator[None]:
    """Within it, `preprocess` works with other sizes of chunks (`chunk_bytes`) and shards (`max_shard_tokens`)."""
    with patch.object(data._core, "preprocess", partial(data._core.preprocess, **private)):
        yield


def plain_samples(dataset: Dataset) -> list[PlainSample]:
    """All samples as lists."""
    return [(sample.input_ids.tolist(), sample.label_mask.tolist()) for sample in dataset]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with its bytes; a directory counts as an empty file."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in paths}


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """The fingerprint of what a manifest says, from docs/format.md alone."""
    files = [[file["num_bytes"], file["blake3"]] for file in manifest["files"]]
    content = [manifest["format"], manifest["format_version"], manifest["recipe"], files]
    canonical = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_dataset(
    directory: Path,
    samples: Sequence[PlainSample],
    *,
    vocab_size: int = 300,
    shard_sizes: Sequence[int] = (),
    change_tensors: Callable[[dict[str, Any]], object] = len,
    **changes: Any,
) -> Path:
    """Writes a dataset from docs/format.md alone.

    Args:
        directory: Where.
        samples: The samples; sample i comes from line i + 1 of `data.jsonl`.
        vocab_size: One more than the largest token id.
        shard_sizes: Samples of each shard; the last shard holds the others.
        change_tensors: Is given the tensors of each shard before they are written.
        changes: Values of the manifest that are to be others.
    """
    directory.mkdir(parents=True)
    token_type = "U16" if vocab_size <= 2**16 else "U32"
    bounds = np.cumsum([0, *shard_sizes, len(samples) - sum(shard_sizes)])
    shards = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        part = samples[start:end]
        ids = [token for sample_ids, _ in part for token in sample_ids]
        mask = [is_label for _, sample_mask in part for is_label in sample_mask]
        tensors = {
            "sample_offsets": np.cumsum([0, *(len(sample_ids) for sample_ids, _ in part)]).astype(np.uint32),
            "sample_records": np.array([(0, line) for line in range(start + 1, end + 1)], np.uint32).reshape(-1, 2),
            "token_ids": np.array(ids, np.uint16 if token_type == "U16" else np.uint32),
            "label_mask": np.packbits(np.array(mask, bool), bitorder="little"),
        }
        # Tokens and mask together take a multiple of four bytes.
        num_odd_bytes = -(tensors["token_ids"].nbytes + tensors["label_mask"].nbytes) % 4
        tensors["label_mask"] = np.pad(tensors["label_mask"], (0, num_odd_bytes))
        change_tensors(tensors)
        path = directory / f"shard-{number:05}.safetensors"
        save_file(tensors, path, metadata={"format": "sft-fast-shard-2"})
        content = path.read_bytes()
        shards.append(
            {
                "name": path.name,
                "num_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "num_samples": len(part),
                "num_tokens": len(ids),
            }
        )
    (directory / "rejected.jsonl").write_bytes(b"")
    segments = (
        json.dumps({"blake3": None, "num_samples": len(samples), "shapes": None}).encode() + b"\n" if samples else b""
    )
    (directory / "segments.jsonl").write_bytes(segments)
    lengths = sorted(len(ids) for ids, _ in samples) or [0]
    manifest = {
        "format": "sft-fast dataset",
        "format_version": 3,
        "recipe": {
            "sequence_length": 1 << 20,
            "too_long": "reject",
            "duplicates": "keep",
            "control_tokens": "plain",
            "train_on": "all_answers",
            "train_on_tool_calls": True,
            "train_on_thinking": True,
            "dropped_thinking": "skip",
            "system_key": None,
            "prompt_key": "instruction",
            "query_key": None,
            "response_key": "output",
            "history_key": None,
            "text_key": "text",
            "record_shape": "auto",
            "tokenizer_sha256": "0" * 64,
            "template_sha256": "0" * 64,
            "template_date": None,
        },
        "tokenizer": "model",
        "template": "native",
        "template_verdict": {},
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "token_type": token_type,
        "files": [
            {
                "path": "data.jsonl",
                "num_bytes": 1,
                "blake3": "0" * 64,
                "num_records": len(samples),
                "num_samples": len(samples),
                "num_rejected": 0,
                "num_tokens": sum(len(ids) for ids, _ in samples),
                "num_label_tokens": sum(sum(mask[1:]) for _, mask in samples),
            }
        ],
        "sources": [{"name": "data", "num_files": 1}],
        "num_records": len(samples),
        "num_samples": len(samples),
        "num_rejected": 0,
        "records_by_shape": {},
        "rejected_by_reason": {},
        "num_truncated": 0,
        "num_split_samples": 0,
        "num_cut_answers": 0,
        "num_control_text": 0,
        "num_skipped_answers": 0,
        "num_tokens": sum(len(ids) for ids, _ in samples),
        "num_label_tokens": sum(sum(mask[1:]) for _, mask in samples),
        "sample_tokens": {
            name: lengths[max(0, -(-len(lengths) * percent // 100) - 1)]
            for name, percent in (("min", 0), ("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
        },
        "shards": shards,
        "segments": {"num_bytes": len(segments), "sha256": hashlib.sha256(segments).hexdigest()},
    }
    manifest |= changes
    if "fingerprint" not in changes:
        manifest["fingerprint"] = fingerprint_of(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return directory
