"""Records that are in memory, or come one by one from a generator → a dataset, by the way that files take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any

from sft_fast.data import Report, preprocess
from sft_fast.errors import InputError
from sft_fast.inputs import scratch_directory
from sft_fast.objects import is_address
from sft_fast.ray_session import cluster_address
from sft_fast.spool import Spool

SOURCE = "<records>"
"""What errors, samples and the manifest call records that are in no file: the third one is `<records>:3`."""


def preprocess_records(records: Iterable[dict[str, Any]], output_dir: str | PathLike[str], **options: Any) -> Report:
    """Turn records from memory into a dataset of tokens and label masks.

    The records are those that a JSON Lines file would hold, and become the same bytes. They are taken one by one and
    kept in a file without a name beside `output_dir`, about as large as they are as JSON, which is gone when the work
    is, however it ends. So memory stays bounded, however many a generator yields.

    Args:
        records: Dicts with `messages`, `conversations` or the mapped fields; values are those that JSON has. An
            exception from a generator passes through, and nothing is written.
        output_dir: Directory of the dataset; must be new, empty, or a dataset.
        options: Arguments of `preprocess`: `tokenizer` and `sequence_length` are required.

    Returns:
        Counts and the path.

    Raises:
        InputError: A record is wrong, or JSON can't hold it; `path` is `<records>`, and `line` its number from 1.
        TemplateError, TokenizerError, DatasetError, FileError, ConfigError: as `preprocess` does.

    Examples:
        >>> records = ({"instruction": f"{n} + 1?", "output": f"{n + 1}"} for n in range(100))
        >>> report = sft_fast.preprocess_records(records, "sums", tokenizer="path/to/model", sequence_length=128)
        >>> report.num_samples
        100
        >>> sft_fast.Dataset("sums")[2].source
        '<records>:3'
    """
    is_shared = cluster_address(options.get("ray_address")) is not None and not is_address(output_dir)
    with Spool(SOURCE, scratch_directory(output_dir), is_shared=is_shared) as spool:
        spool.write(_lines(records))
        return preprocess(spool, output_dir, **options)


def _lines(records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    for number, record in enumerate(records, start=1):
        try:
            line = json.dumps(record)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"expected a record that JSON can hold: {error}", code="wrong_type", path=SOURCE, line=number
            ) from error
        yield line.encode() + b"\n"
