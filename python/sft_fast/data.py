"""Datasets of samples on disk, and the packs they are planned into."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal

from sft_fast import _core, lease, objects
from sft_fast._core import Progress
from sft_fast.distributed import RayExecutor
from sft_fast.errors import ConfigError
from sft_fast.inputs import Inputs, resolve
from sft_fast.mixing import Files, Source, describe, read_entries, shares
from sft_fast.ray_session import cluster_address

if TYPE_CHECKING:  # numpy is a large part of the start-up, and preprocessing needs none
    import datasets
    import numpy as np
    import pyarrow
    from numpy.typing import NDArray

    from sft_fast import reference

RecordShape = Literal["auto", "fields", "messages", "conversations", "prompt_completion", "text"]
"""How a record says what it says; see docs/data.md."""

Batch = dict[str, Any]
"""Arrays of a micro-batch; see `Packing.batch`."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `preprocess` made: `num_records == num_samples - num_split_samples + num_rejected`."""

    path: str
    """Directory of the dataset."""
    fingerprint: str
    """Hash of everything that decides the dataset's content."""
    num_records: int
    num_samples: int
    num_rejected: int
    rejected_by_reason: dict[str, int]
    """Records left out by reason code; each is a line of `rejected.jsonl`."""
    records_by_shape: dict[str, int]
    """Records that could be read, by their shape."""
    num_truncated: int
    """Samples that lost their end to `sequence_length`, by `too_long="truncate_turns"` or `"truncate"`."""
    num_cut_answers: int
    """Samples whose last answer lost its end, by `too_long="truncate"`."""
    num_split_samples: int
    """Samples of a record beyond its first, by `dropped_thinking="split"`."""
    num_skipped_answers: int
    """Answers that are not trained on because the template leaves out their thinking."""
    num_control_text: int
    """Samples with text that spells a control token and was encoded as ordinary text (`control_tokens="plain"`)."""
    num_tokens: int
    num_label_tokens: int
    """Tokens with a loss."""
    max_sample_tokens: int
    num_bytes: int
    """Bytes of input."""
    seconds: float
    reused: bool
    """Whether the dataset was there already."""
    num_reused_samples: int
    """Samples that were not encoded, because an older dataset had them: their part of the input did not change."""
    skipped_files: list[str]
    """What was left aside in directories that were named."""
    sources: tuple[Source, ...]
    """What came of each entry of `files`, and how much of it an epoch uses: for `Dataset(path, sources=...)`."""
    why_not_fast: str | None
    """Why the `tokenizers` library encoded, not the fast engine, where it did: the tokens are the same."""
    comparison: reference.Comparison | None
    """What came of `verify`; `None` where nothing was compared."""
    transfer: objects.Transfer
    """What was moved from and to object storage, and how often a request had to be made again."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The tokens of one record."""

    input_ids: NDArray[np.uint32]
    """Token ids, uint32 [n]."""
    label_mask: NDArray[np.bool_]
    """True where a token is trained on, bool [n]."""
    source: str
    """Where the record is: `file:line`."""


def preprocess(
    files: Files,
    output_dir: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str],
    template: str = "native",
    sequence_length: int,
    system_key: str | None = None,
    prompt_key: str = "instruction",
    query_key: str | None = None,
    response_key: str = "output",
    history_key: str | None = None,
    text_key: str = "text",
    record_shape: RecordShape = "auto",
    template_date: str | None = None,
    num_threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    too_long: Literal["reject", "truncate_turns", "truncate"] = "reject",
    duplicates: Literal["keep", "drop"] = "keep",
    control_tokens: Literal["plain", "reject", "allow"] = "plain",
    train_on: Literal["all_answers", "last_answer"] = "all_answers",
    train_on_tool_calls: bool = True,
    train_on_thinking: bool = True,
    dropped_thinking: Literal["skip", "split", "reject", "keep"] = "skip",
    verify: Literal["none", "sampled", "all"] = "none",
    ray_address: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | None = None,
) -> Report:
    """Turn records into a dataset of tokens and label masks.

    The same input and settings give the same bytes, whatever the number of threads. If `output_dir` holds that very
    dataset already, nothing is done. If anything fails, `output_dir` is as it was.

    Args:
        files: Paths, globs or directories of JSON Lines files, JSON arrays or Parquet files, and data sets of Hugging
            Face: what `save_to_disk` wrote, or `hf:NAME@CONFIG:SPLIT`; on this machine or in object storage, as
            `s3://bucket/data/*.jsonl`. A list mixes sources: each entry is one, and may
            be a mapping of `path`, `name`, `weight` and `max_samples`; the last two decide what an epoch uses, and
            never the tokens (`Report.sources`).
        output_dir: Directory of the dataset; must be new, empty, or a dataset. An address such as `s3://bucket/name`
            puts it into object storage, where a reader sees the old dataset or all of the new one.
        tokenizer: Directory of a model with `tokenizer.json`.
        template: `native` (the model's own chat template), a name such as `qwen2_5`, or a `.jinja` file.
        sequence_length: Longest sample, in tokens.
        system_key: Field of the system prompt; a record may lack it.
        prompt_key: Field of the prompt.
        query_key: Field that is appended to the prompt after a newline; a record may lack it.
        response_key: Field of the answer.
        history_key: Field of earlier turns, a list of pairs of prompt and answer; a record may lack it.
        text_key: Field of plain text, which no chat template frames.
        record_shape: The shape that every record has: `fields`, `messages`, `conversations`, `prompt_completion` or
            `text`. `auto` reads each record by its keys.
        template_date: The date, as 2026-01-31, that a chat template takes for today if it asks; by default today's.
        num_threads: Threads that encode; one for each core by default.
        on_error: `raise` stops at the first wrong record; `skip` leaves wrong records out, lists them in
            `rejected.jsonl` and counts them.
        too_long: A sample of more than `sequence_length` tokens: `reject` leaves it out, `truncate_turns` leaves out
            its last turns so that it ends with a whole answer, `truncate` cuts it; all are counted.
        duplicates: A record whose samples have the same ids and label masks as those of one before it: `drop` leaves
            it out and counts it.
        control_tokens: Text in a record that spells a control token, such as `<|im_end|>`: `plain` encodes it as
            ordinary text, `reject` leaves the record out and counts it, `allow` does as transformers.
        train_on: `all_answers` of a conversation, or the `last_answer` alone.
        train_on_tool_calls: Whether answers are trained on that call tools.
        train_on_thinking: Whether the thinking of an answer is trained on.
        dropped_thinking: An answer whose thinking the template leaves out of the text: `skip` does not train on it,
            `split` makes a sample of the conversation up to it, `reject` leaves the record out, `keep` trains on what
            is there.
        verify: Whether samples are compared with those that transformers makes of the same conversations: `none`, one
            hundred of them (`sampled`) or `all`; see docs/exactness.md. This is done anew whenever it is asked for.
        ray_address: A Ray cluster whose machines encode: `HOST:PORT`, or `auto` for that of this machine; by default
            the one that `RAY_ADDRESS` names. `local`, or neither: this process. The dataset is the same, byte for byte.
        overwrite: Whether another dataset in `output_dir` may be replaced.
        progress: Called about ten times a second with the state of the work; an exception stops it.

    Returns:
        Counts and the path.

    Raises:
        InputError: A record is wrong; the error has its file, line and column.
        TemplateError: The chat template is missing or can't be rendered faithfully.
        TokenizerError: The tokenizer is missing or can't be read.
        DatasetError: `output_dir` holds something else; or a sample is not that of transformers.
        FileError: A file can't be read or written.
        ConfigError: An argument is wrong.
        ClusterError: The machines of a Ray cluster did not do the work.

    Examples:
        >>> report = sft_fast.preprocess("data.jsonl", "new", tokenizer="path/to/model", sequence_length=256)
        >>> report.num_records, report.num_samples, report.num_rejected
        (3, 3, 0)
        >>> report.path
        'new'
    """
    return _preprocess(output_dir, in_cache=False, overwrite=overwrite, files=files, tokenizer=tokenizer,
                       template=template, sequence_length=sequence_length, system_key=system_key, prompt_key=prompt_key,
                       query_key=query_key, response_key=response_key, history_key=history_key, text_key=text_key,
                       record_shape=record_shape, template_date=template_date,
                       num_threads=num_threads, on_error=on_error, too_long=too_long,
                       duplicates=duplicates, control_tokens=control_tokens,
                       train_on=train_on, train_on_tool_calls=train_on_tool_calls, train_on_thinking=train_on_thinking,
                       dropped_thinking=dropped_thinking, verify=verify, ray_address=ray_address,
                       progress=progress)  # fmt: skip


def ensure_dataset(
    files: Files,
    cache_dir: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str],
    template: str = "native",
    sequence_length: int,
    system_key: str | None = None,
    prompt_key: str = "instruction",
    query_key: str | None = None,
    response_key: str = "output",
    history_key: str | None = None,
    text_key: str = "text",
    record_shape: RecordShape = "auto",
    template_date: str | None = None,
    num_threads: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    too_long: Literal["reject", "truncate_turns", "truncate"] = "reject",
    duplicates: Literal["keep", "drop"] = "keep",
    control_tokens: Literal["plain", "reject", "allow"] = "plain",
    train_on: Literal["all_answers", "last_answer"] = "all_answers",
    train_on_tool_calls: bool = True,
    train_on_thinking: bool = True,
    dropped_thinking: Literal["skip", "split", "reject", "keep"] = "skip",
    verify: Literal["none", "sampled", "all"] = "none",
    ray_address: str | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Report:
    """Find the dataset of these files and settings in `cache_dir`, or make it there.

    Datasets are found by content: the bytes of the files, the tokenizer, the template and the settings, never by path
    or time. Of several processes that want the same dataset at once, one makes it and the others wait. To its end, this
    process counts as one that uses the dataset: `sft-fast cache prune` leaves it alone.

    The arguments and errors are those of `preprocess`.

    Examples:
        >>> options = {"tokenizer": "path/to/model", "sequence_length": 256}
        >>> made = sft_fast.ensure_dataset("data.jsonl", "cache", **options)
        >>> found = sft_fast.ensure_dataset("data.jsonl", "cache", **options)
        >>> made.reused, found.reused, made.path == found.path
        (False, True, True)
    """
    while True:
        report = _preprocess(
            cache_dir, in_cache=True, overwrite=False, files=files, tokenizer=tokenizer, template=template,
            sequence_length=sequence_length, system_key=system_key, prompt_key=prompt_key, query_key=query_key,
            response_key=response_key, history_key=history_key, text_key=text_key, record_shape=record_shape,
            template_date=template_date, num_threads=num_threads, on_error=on_error,
            too_long=too_long, duplicates=duplicates, control_tokens=control_tokens,
                       train_on=train_on, train_on_tool_calls=train_on_tool_calls, train_on_thinking=train_on_thinking,
                       dropped_thinking=dropped_thinking, verify=verify, ray_address=ray_address,
                       progress=progress,
        )  # fmt: skip
        if objects.is_address(report.path) or lease.keep(report.path):
            return report
        # It was pruned in the moment between; make it again.


def _preprocess(
    output_dir: str | PathLike[str],
    *,
    files: Files,
    sequence_length: int,
    num_threads: int | None,
    control_tokens: str,
    train_on: str,
    train_on_tool_calls: bool,
    train_on_thinking: bool,
    dropped_thinking: str,
    verify: Literal["none", "sampled", "all"],
    ray_address: str | None,
    **arguments: Any,
) -> Report:
    check_number("sequence_length", sequence_length, 2, 2**32 - 1)
    if num_threads is not None:
        check_number("num_threads", num_threads, 1, 1024)
    if verify not in ("none", "sampled", "all"):
        raise ConfigError(f"expected verify to be 'none', 'sampled' or 'all', found {verify!r}", code="unknown_value")
    entries = read_entries(files)
    inputs, num_files = Inputs(), []
    for entry in entries:
        found = resolve(entry.paths)
        num_files.append(len(found.files))
        inputs.add(found)
    policies: dict[str, str | bool] = {
        "control_tokens": control_tokens, "train_on": train_on, "train_on_tool_calls": train_on_tool_calls,
        "train_on_thinking": train_on_thinking, "dropped_thinking": dropped_thinking,
    }  # fmt: skip
    comparison = None
    make: Callable[..., tuple[str, str, bool, int, float, str | None]] = _core.preprocess
    address = _cluster_of(ray_address, output_dir, inputs)
    if objects.is_address(output_dir):
        from sft_fast.objects.making import Making

        make = Making(fspath(output_dir), inputs.transfer)
    else:
        output_dir = objects.local_path(output_dir)
    with contextlib.ExitStack() as stack:
        executor = None
        if address is not None:
            executor = RayExecutor(address, num_threads)
            stack.callback(executor.close)
        paths, names = stack.enter_context(inputs.opened(output_dir, is_shared=executor is not None))
        path, manifest_json, reused, num_reused_samples, seconds, why_not_fast = make(
            paths, output_dir, sequence_length=sequence_length, num_threads=num_threads, file_names=names,
            sources=[(entry.name, num) for entry, num in zip(entries, num_files, strict=True)],
            policies=policies, executor=executor, **arguments,
        )  # fmt: skip
        if verify != "none":
            from sft_fast import reference

            comparison = reference.compare(
                Dataset(path), paths, verify=verify, tokenizer=arguments["tokenizer"], template=arguments["template"],
                mapping={key: arguments[key] for key in _MAPPED},
                policies={**policies, "too_long": arguments["too_long"]}, file_names=names,
            )  # fmt: skip
    manifest = json.loads(manifest_json)
    return Report(
        path=fspath(path),
        sources=describe(
            manifest,
            [
                Source(name=entry.name, num_files=num, weight=entry.weight, max_samples=entry.max_samples)
                for entry, num in zip(entries, num_files, strict=True)
            ],
        ),
        max_sample_tokens=manifest["sample_tokens"].get("max", 0),
        num_bytes=sum(file["num_bytes"] for file in manifest["files"]),
        seconds=seconds,
        reused=reused,
        num_reused_samples=num_reused_samples,
        why_not_fast=why_not_fast,
        skipped_files=inputs.skipped,
        comparison=comparison,
        transfer=inputs.transfer,
        **{key: manifest[key] for key in _REPORTED},
    )


def _cluster_of(ray_address: str | None, output_dir: str | PathLike[str], inputs: Inputs) -> str | None:
    """The address of the cluster that is to encode; `None` where this process does."""
    address = cluster_address(ray_address)
    remote = next((place for place in (fspath(output_dir), *(file.name for file in inputs.files))
                   if objects.is_address(place)), None)  # fmt: skip
    if address is None or remote is None:
        return address
    if ray_address is None:
        return None  # RAY_ADDRESS may be there for something else
    raise ConfigError(
        "a Ray cluster reads and writes storage that all machines see under one path, found an address of an object",
        path=remote,
        location="ray_address",
        hint="copy the input to shared storage, and the data set from there; or ray_address=local",
    )


_MAPPED = (
    "system_key", "prompt_key", "query_key", "response_key", "history_key", "text_key", "record_shape",
)  # fmt: skip
_REPORTED = (
    "fingerprint", "num_records", "num_samples", "num_rejected", "rejected_by_reason", "records_by_shape",
    "num_truncated", "num_cut_answers", "num_split_samples", "num_skipped_answers", "num_control_text", "num_tokens",
    "num_label_tokens",
)  # fmt: skip


def verify(path: str | PathLike[str], progress: Callable[[int], object] | None = None) -> None:
    """Prove a dataset whole: checksums, and the laws between its parts.

    Args:
        path: Directory of the dataset.
        progress: Called with the bytes of each shard that is proved.

    Raises:
        DatasetError: Something is missing, damaged or of another version; the error says what.

    Examples:
        >>> sft_fast.verify("out")  # says nothing: all of it is right
    """
    _core.Dataset(Dataset(path).directory).verify(progress)


class Dataset(Sequence[Sample]):
    """A dataset on disk, mapped into memory: `dataset[i]` is a `Sample`, in the order of the records.

    Args:
        path: Directory that `preprocess` wrote. Of an address such as `s3://bucket/name`, a copy is made in the cache
            of this machine, its checksums proved, and stays there as long as it is used; see docs/data.md.
        sources: How much of each source an epoch uses, such as `Report.sources`; by default each sample, once.

    Raises:
        DatasetError: It is no dataset, or damaged. Checksums are not read; `verify` does that.
        FileError: Object storage can't be reached, or the cache is full.
        ConfigError: `sources` are those of other files.

    Examples:
        >>> dataset = sft_fast.Dataset("out")
        >>> len(dataset), dataset.manifest["num_records"], dataset.lengths.dtype
        (3, 3, dtype('uint32'))
        >>> sample = dataset[0]
        >>> sample.source, sample.input_ids.dtype, sample.label_mask.dtype
        ('data.jsonl:1', dtype('uint32'), dtype('bool'))
    """

    def __init__(self, path: str | PathLike[str], sources: Sequence[Source] | None = None) -> None:
        self.path = fspath(path)
        """As it was given."""
        self.transfer = objects.Transfer()
        """What came from object storage."""
        self.directory = objects.local_path(path)
        """Where the files are on this machine."""
        self._use: object
        if objects.is_address(path):
            from sft_fast.objects.datasets import open_dataset

            held = open_dataset(self.path, self.transfer)
            self.directory, self._use = str(held.path), held
        else:
            self._use = lease.Use(self.directory)
        self._core = _core.Dataset(self.directory)
        self.sources = describe(self.manifest, sources)
        """The sources, in order, with their counts."""

    def __reduce__(self) -> tuple[type[Dataset], tuple[str, tuple[Source, ...]]]:
        return Dataset, (self.path, self.sources)

    def __len__(self) -> int:
        return len(self._core)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices would copy; nobody needs them
        input_ids, label_mask, path, line = self._core.sample(_index(index, len(self)))
        return Sample(input_ids=input_ids, label_mask=label_mask, source=f"{path}:{line}")

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says; see docs/format.md."""
        manifest: dict[str, Any] = json.loads(self._core.manifest())
        return manifest

    @functools.cached_property
    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each sample, uint32 [num_samples]."""
        return self._core.lengths()

    @functools.cached_property
    def source_numbers(self) -> NDArray[np.uint32]:
        """The source of each sample, as a number into `sources`, uint32 [num_samples]."""
        import numpy as np

        of_file = [number for number, source in enumerate(self.sources) for _ in range(source.num_files)]
        return np.array(of_file, np.uint32)[self._core.files()]

    def source_of(self, index: int) -> str:
        """The name of the source that sample `index` belongs to.

        Examples:
            >>> sft_fast.Dataset("out").source_of(0)
            'data'
        """
        return self.sources[int(self.source_numbers[_index(index, len(self))])].name

    def mix(self, weights: Mapping[str, float], max_samples: Mapping[str, int] | None = None) -> Dataset:
        """The same samples, of which an epoch uses those of some sources more or less often.

        Args:
            weights: How often an epoch uses a sample, by the name of its source; 1 where a source is left out.
            max_samples: Samples that are used at all, by the name of their source; all where a source is left out.

        Raises:
            ConfigError: There is no such source, or a number is out of range.

        Examples:
            >>> dataset = sft_fast.Dataset("out").mix({"data": 2.0})
            >>> sorted(dataset.pack(sequence_length=256)[0].tolist())
            [0, 0, 1, 1, 2, 2]
        """
        max_samples = max_samples or {}
        names = [source.name for source in self.sources]
        for name in (*weights, *max_samples):
            if name not in names:
                raise ConfigError(f'expected one of the sources {", ".join(names)}, found "{name}"')
        changed = []
        for source in self.sources:
            weight, most = weights.get(source.name, 1.0), max_samples.get(source.name)
            [entry] = read_entries({"path": source.name, "weight": weight, "max_samples": most}, source.name)
            changed.append(replace(source, weight=entry.weight, max_samples=entry.max_samples))
        return Dataset(self.path, changed)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the content."""
        return str(self.manifest["fingerprint"])

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return int(self.manifest["vocab_size"])

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows."""
        return int(self.manifest["pad_token_id"])

    def to_arrow(self) -> pyarrow.Table:
        """The samples as an Arrow table, for `datasets.Dataset(table)` or any other reader; see `arrow.to_arrow`."""
        from sft_fast import arrow

        return arrow.to_arrow(self)

    @classmethod
    def from_arrow(
        cls,
        table: pyarrow.Table | datasets.Dataset,
        path: str | PathLike[str],
        **options: Any,
    ) -> Dataset:
        """Makes a dataset of token ids and labels that are in an Arrow table; see `arrow.from_arrow`."""
        from sft_fast import arrow

        return cls(arrow.from_arrow(table, path, **options))

    def pack(self, *, sequence_length: int, seed: int = 42, epoch: int = 0) -> Packing:
        """Plan packs: rows of whole samples, as full as they can be made.

        A pure function of the sample lengths, the sources and the arguments, equal on every rank and machine. Every
        sample is in exactly one pack; where sources have weights, in as many as the epoch uses it.

        Args:
            sequence_length: Tokens that a pack may hold.
            seed: Decides, with `epoch`, which samples share a pack and the order of the packs.
            epoch: From 0.

        Raises:
            ConfigError: A sample is longer than `sequence_length`, or a number is out of range.

        Examples:
            >>> packing = sft_fast.Dataset("out").pack(sequence_length=256, seed=42, epoch=0)
            >>> len(packing), sorted(packing[0].tolist()), 0 < packing.fill_ratio <= 1
            (1, [0, 1, 2], True)
        """
        return self._plan(sequence_length, seed, epoch, True)

    def rows(self, *, sequence_length: int, seed: int = 42, epoch: int = 0) -> Packing:
        """Rows of one sample each, shuffled: the unpacked mode. Arguments and errors are those of `pack`.

        Examples:
            >>> rows = sft_fast.Dataset("out").rows(sequence_length=256)
            >>> sorted(row.tolist() for row in rows)
            [[0], [1], [2]]
        """
        return self._plan(sequence_length, seed, epoch, False)

    def _plan(self, sequence_length: int, seed: int, epoch: int, packed: bool) -> Packing:
        check_number("sequence_length", sequence_length, 1, 2**32 - 1)
        check_number("seed", seed, 0, 2**64 - 1)
        check_number("epoch", epoch, 0, 2**64 - 1)
        return Packing(self, self._core.pack(sequence_length, seed, epoch, packed, shares(self.sources)))


class Packing(Sequence["NDArray[np.uint32]"]):
    """The rows of one epoch; `packing[i]` are the sample numbers of row i, uint32 [k]."""

    def __init__(self, dataset: Dataset, core: _core.Packing) -> None:
        self.dataset = dataset
        self._core = core

    def __len__(self) -> int:
        return len(self._core)

    def __getitem__(self, index: int) -> NDArray[np.uint32]:  # type: ignore[override]  # as for Dataset
        return self._core.row(_index(index, len(self)))

    def __iter__(self) -> Iterator[NDArray[np.uint32]]:
        return (self[index] for index in range(len(self)))

    @property
    def fill_ratio(self) -> float:
        """The part of all positions that holds a token, in rows of `sequence_length`: 0 to 1."""
        return self._core.fill_ratio

    def batch(self, rows: Sequence[int], *, shift_labels: bool = False, width: int | None = None) -> Batch:
        """The arrays of a micro-batch.

        Args:
            rows: Row numbers.
            shift_labels: If true, `labels[t]` is the target of position t: the next token of the same sample. If false,
                `labels[t]` belongs to token t and the model shifts, as transformers does; the first token of a sample
                then never has a label.
            width: Tokens of a row; by default `sequence_length` for packs, and the longest of `rows` otherwise.

        Returns:
            `input_ids`, `labels` (-100 where there is no loss) and `position_ids` (from 0 in each sample), int64
            [len(rows), width]; `cu_seqlens`, int32 [k + 1], the bounds of the k samples in the flattened rows, where
            the padding behind the last sample of a row counts as a sample; `max_seqlen`, the longest of them.

        Raises:
            IndexError: There is no such row.
            ValueError: `width` is too narrow for a row, or the arrays would have 2^31 positions or more.

        Examples:
            >>> packing = sft_fast.Dataset("out").pack(sequence_length=256)
            >>> batch = packing.batch([0])
            >>> batch["input_ids"].shape, batch["input_ids"].dtype, batch["labels"].shape
            ((1, 256), dtype('int64'), (1, 256))
            >>> len(batch["cu_seqlens"]) - 1  # three samples, and the padding behind them
            4
        """
        rows = self._rows(rows)
        if width is None:
            width = self._core.sequence_length if self._core.is_packed else self._core.max_row_tokens(rows)
        return _batch(*self._core.batch(rows, width, shift_labels))

    def flat_batch(self, rows: Sequence[int], *, shift_labels: bool = False) -> Batch:
        """As `batch`, with the samples of all rows end to end in one row, int64 [1, tokens], without any padding.

        Raises:
            IndexError: There is no such row.
            ValueError: The row would have 2^31 tokens or more.

        Examples:
            >>> dataset = sft_fast.Dataset("out")
            >>> batch = dataset.pack(sequence_length=256).flat_batch([0])
            >>> batch["input_ids"].shape == (1, dataset.lengths.sum())
            True
        """
        return _batch(*self._core.flat_batch(self._rows(rows), shift_labels))

    def fill(
        self,
        rows: Sequence[int],
        *,
        input_ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        shift_labels: bool = False,
    ) -> tuple[NDArray[np.int32], int]:
        """As `batch`, into arrays int64 [len(rows), width] that the caller owns, such as views of pinned memory.

        Returns:
            `cu_seqlens` and `max_seqlen`.

        Raises:
            IndexError: There is no such row.
            ValueError: The arrays have other shapes, are too narrow for a row, or are not contiguous.

        Examples:
            >>> import numpy as np
            >>> names = ("input_ids", "labels", "position_ids")
            >>> memory = {name: np.empty((1, 256), np.int64) for name in names}
            >>> packing = sft_fast.Dataset("out").pack(sequence_length=256)
            >>> cu_seqlens, max_seqlen = packing.fill([0], **memory)
            >>> int(cu_seqlens[-1])
            256
        """
        return self._core.fill(self._rows(rows), shift_labels, input_ids, labels, position_ids)

    def _rows(self, rows: Sequence[int]) -> list[int]:
        return [_index(row, len(self)) for row in rows]


def _batch(
    arrays: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    cu_seqlens: NDArray[np.int32],
    max_seqlen: int,
) -> Batch:
    batch: Batch = dict(zip(("input_ids", "labels", "position_ids"), arrays, strict=True))
    return {**batch, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}


def check_number(name: str, value: int, lowest: int, highest: int) -> None:
    """Raises a `ConfigError` for a number out of range."""
    if not lowest <= value <= highest:
        raise ConfigError(f"expected {name} to be a number from {lowest:,} to {highest:,}, found {value:,}")


def _index(index: int, length: int) -> int:
    """Python's rule for negative indices."""
    index = int(index)
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length}")
    return index % length
