"""The Rust extension. Private: `sft_fast` wraps it and documents it."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DATASET_FORMAT",
    "FORMAT_VERSION",
    "Assembler",
    "ChatTemplate",
    "Conversations",
    "Dataset",
    "Packing",
    "Progress",
    "Steps",
    "TaskRunner",
    "__version__",
    "cpu_features",
    "engine_level",
    "plan_lengths",
    "preprocess",
    "samples_taken",
    "total_steps",
]

__version__: str
DATASET_FORMAT: str
FORMAT_VERSION: int

@final
class Progress:
    """How far preprocessing is, as `progress` is told; counts are of what is finished, in the order of the input."""

    @property
    def is_hashing(self) -> bool:
        """Whether the input is still being hashed, to find out whether the dataset is there already."""
    @property
    def num_bytes(self) -> int:
        """Bytes of input read in this phase."""
    @property
    def num_total_bytes(self) -> int:
        """Bytes of input in all."""
    @property
    def num_records(self) -> int: ...
    @property
    def num_rejected(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def records_by_shape(self) -> dict[str, int]:
        """Records that could be read, by the name of their shape; shapes that did not occur are left out."""

def preprocess(
    files: Sequence[str | PathLike[str]],
    output_dir: str | PathLike[str],
    *,
    in_cache: bool,
    tokenizer: str | PathLike[str],
    template: str,
    sequence_length: int,
    system_key: str | None,
    prompt_key: str,
    query_key: str | None,
    response_key: str,
    history_key: str | None,
    text_key: str,
    record_shape: str,
    template_date: str | None,
    num_threads: int | None,
    on_error: str,
    too_long: str,
    duplicates: str,
    policies: Mapping[str, str | bool],
    overwrite: bool,
    progress: Callable[[Progress], object] | None,
    file_names: Sequence[str] | None = None,
    sources: Sequence[tuple[str, int]] | None = None,
    elsewhere: Callable[[str], str | None] | None = None,
    chunk_bytes: int | None = None,
    max_shard_tokens: int | None = None,
    executor: object | None = None,
    part_bytes: int | None = None,
) -> tuple[str, str, bool, int, float, str | None]: ...

@final
class TaskRunner:
    """Does tasks of a `preprocess` of another process, which gave them to its executor."""

    def __new__(cls, tokenizer: str, template: str, template_date: str) -> TaskRunner: ...
    def run(self, task: str, directory: str, num_threads: int | None, unique: str) -> str: ...

@final
class ChatTemplate:
    def __new__(cls, tokenizer: str | PathLike[str], template: str, date: str | None = None) -> ChatTemplate: ...
    @property
    def source(self) -> str: ...
    @property
    def why_not_fast(self) -> str | None: ...
    def verdict(self) -> str: ...
    def render(self, record: str, policies: Mapping[str, str | bool]) -> tuple[str, list[tuple[int, int]]]: ...
    def encode(
        self, record: str, policies: Mapping[str, str | bool]
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]: ...
    def render_batch(
        self, records: Sequence[str], policies: Mapping[str, str | bool], num_threads: int | None
    ) -> list[tuple[str, list[tuple[int, int]]]]: ...
    def encode_batch(
        self, records: Sequence[str], policies: Mapping[str, str | bool], num_threads: int | None
    ) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]: ...

@final
class Conversations:
    def __new__(
        cls,
        files: Sequence[str | PathLike[str]],
        *,
        system_key: str | None,
        prompt_key: str,
        query_key: str | None,
        response_key: str,
        history_key: str | None,
        text_key: str,
        record_shape: str,
        policies: Mapping[str, str | bool],
        file_names: Sequence[str | PathLike[str]] | None = None,
        wanted: set[tuple[str, int]] | None = None,
    ) -> Conversations: ...
    def __iter__(self) -> Conversations: ...
    def __next__(self) -> list[tuple[str, int, str]]: ...

@final
class Assembler:
    def __new__(
        cls,
        path: str | PathLike[str],
        files: Sequence[str],
        sequence_length: int,
        vocab_size: int,
        pad_token_id: int,
        tokenizer: str,
    ) -> Assembler: ...
    def push(
        self,
        offsets: NDArray[np.int64],
        ids: NDArray[np.uint32],
        mask: NDArray[np.bool_],
        files: NDArray[np.uint32],
        lines: NDArray[np.uint32],
    ) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...

@final
class Dataset:
    def __new__(cls, path: str | PathLike[str]) -> Dataset: ...
    def __len__(self) -> int: ...
    def sample(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_], str, int]: ...
    def samples(
        self, start: int, end: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.bool_], NDArray[np.uint32], NDArray[np.uint32]]: ...
    def lengths(self) -> NDArray[np.uint32]: ...
    def survey(self) -> dict[str, NDArray[Any]]:
        """One pass over all samples: arrays [num_samples] by name.

        `num_label_tokens` and `num_label_runs` (tokens with a loss, runs of trained tokens), `files` and `lines`
        (number of the file in the manifest, line from 1), all uint32; `ids_hashes` and `mask_hashes`, uint64, equal for
        equal ids and masks.
        """
    def manifest(self) -> str: ...
    def verify(self, progress: Callable[[int], object] | None) -> None: ...
    def files(self) -> NDArray[np.uint32]:
        """Number of the file in the manifest that each sample comes from, uint32 [num_samples]."""
    def pack(
        self,
        sequence_length: int,
        seed: int,
        epoch: int,
        packed: bool,
        shares: list[tuple[int, int, int | None]] | None = None,
    ) -> Packing: ...

@final
class Packing:
    def __len__(self) -> int: ...
    def row(self, index: int) -> NDArray[np.uint32]: ...
    @property
    def fill_ratio(self) -> float: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def is_packed(self) -> bool: ...
    def row_lengths(self) -> NDArray[np.uint32]:
        """Tokens of each row, uint32 [num_rows]."""
    def max_row_tokens(self, rows: Sequence[int]) -> int: ...
    def count_tokens(self, rows: Sequence[int]) -> tuple[int, int]: ...
    def batch(
        self, rows: Sequence[int], width: int, shift_labels: bool
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32], int]: ...
    def flat_batch(
        self, rows: Sequence[int], shift_labels: bool
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int32], int]: ...
    def fill(
        self,
        rows: Sequence[int],
        shift_labels: bool,
        input_ids: NDArray[np.int64],
        labels: NDArray[np.int64],
        position_ids: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], int]: ...
    def steps(self, num_rows_per_step: int) -> Steps: ...

@final
class Steps:
    def __len__(self) -> int: ...
    def rows(self, index: int) -> list[int]: ...
    def assign(self, index: int, rank: int, world_size: int, rows_per_micro_batch: int) -> list[list[int]]: ...
    def imbalance(self, world_size: int) -> tuple[float, float]: ...

def cpu_features() -> list[tuple[str, bool]]:
    """(name, whether the processor has it) of each instruction set that the engine knows to use."""

def engine_level() -> str:
    """The path that the tokenizer engine takes on this machine: `avx512`, `avx2`, `neon` or `plain`."""

def samples_taken(num_samples: int, weight_millionths: int, max_samples: int | None = None) -> tuple[int, int, bool]:
    """Samples that are used at all, samples of an epoch, and whether all epochs take the same, of a source."""

def plan_lengths(
    lengths: NDArray[np.uint32], sequence_length: int, seed: int, epoch: int, num_rows_per_step: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], Steps]: ...
def total_steps(num_steps_per_epoch: int, num_epochs: float, max_steps: int | None = None) -> int: ...
