"""Checkpoints on disk: complete or absent, never half.

    <output_dir>/sft_train/checkpoint-<step>/manifest.json     written last: every other file and its size
                                             state.json        `TrainState`: what a resumed run must agree with
                                             model/            config.json and tokenizer, so that it can be exported
                                             <cluster_name>/   weights and optimizer state, as the strategy writes them

All ranks write into a staging directory beside it, whose name no reader takes for a checkpoint. When every rank has
answered, the driver writes the manifest, forces everything to the disk and renames. A rank that writes while it trains
also leaves a mark there when it is done: it may not live to be asked. Our own state is JSON; what
DeepSpeed writes is a pickle, so a checkpoint is read only from where the user's own runs wrote it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sft_fast import console
from sft_fast.errors import ConfigError, SftFastError, TrainError

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig

CLUSTER_NAME = "sft_train"
MODEL_DIRECTORY = "model"
FORMAT = 1

_MANIFEST, _STATE = "manifest.json", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING, _REPLACED = ".staging-", ".replaced-"
_WRITTEN = "written-"  # with the number of a rank, the name of an empty file
# What a write that failed leaves free: less than a block of one of torch's buffers.
_FULL_DISK_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands, and which run it is."""

    fingerprint: str  # of the training data
    seed: int
    data_seed: int
    sequence_length: int
    is_packed: bool
    num_rows_per_step: int
    model_args: dict[str, Any]

    step: int  # steps done
    run_id: str  # the same through all resumptions
    best_val_loss: float | None  # of all validations so far
    world_size: int
    zero_stage: int  # 0 without DeepSpeed
    pretrain: str
    saved_at: float  # seconds since 1970
    strategy_name: str = "deepspeed_train"
    val_loss: float | None = None  # of the validation after this very step, where there was one
    num_skipped_steps: int = 0  # steps so far whose loss or gradient was not finite
    mix: list[list[int | None]] = dataclasses.field(default_factory=list)  # of the sources, where an epoch is not all
    tensor_parallel_size: int = 1  # ranks that split each weight between them
    num_evals_without_gain: int = 0  # validations since one that was better by more than the threshold

    # Which samples each step has, and what the saved weights are, is decided by these: a run may not change them on the
    # way. Beside each: the keys that set it.
    FIXED: ClassVar[dict[str, str]] = {
        "fingerprint": "the training data, its template or the tokenizer",
        "seed": "seed",
        "data_seed": "sft_train.training_args.data_seed",
        "sequence_length": "sequence_length",
        "mix": "sft_train.data_args.file_name, number of files, weight in millionths and max_samples of each source",
        "is_packed": "sft_train.use_sequence_packing",
        "num_rows_per_step": "per_device_train_batch_size x gradient_accumulation_steps x data-parallel ranks",
        "dtype": "sft_train.model_args.dtype",
        "strategy_name": "sft_train.strategy_args.strategy_name",
        "zero_stage": "sft_train.strategy_args.strategy_config.zero_optimization.stage",
        "adapters": "sft_train.model_args.lora_target, lora_rank, additional_target, adapter_name_or_path, "
        "quantization",
    }

    @property
    def dtype(self) -> Any:
        """Precision of the saved weights."""
        return self.model_args.get("dtype")

    @property
    def adapters(self) -> list[Any]:
        """Which adapters there are, and of which shape."""
        names = ("lora_target", "lora_rank", "additional_target", "adapter_name_or_path", "quantization")
        return [self.model_args.get(name) for name in names]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    state: TrainState


def checkpoints_root(output_dir: str) -> Path:
    """The directory that holds the checkpoints of a run."""
    return Path(output_dir) / CLUSTER_NAME


def staging_directory(output_dir: str, step: int) -> Path:
    """A new name to write the checkpoint of `step` under; `commit` gives it its real one."""
    return checkpoints_root(output_dir) / f"checkpoint-{step}{_STAGING}{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def naming_a_full_disk(directory: str | Path) -> Iterator[None]:
    """Says so when what goes wrong inside is that the disk of `directory` is full: torch's own words do not.

    Raises:
        TrainError: the disk is full. Any other error stays as it is.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        num_free_bytes = _num_free_bytes(Path(directory))
        if isinstance(error, SftFastError) or num_free_bytes >= _FULL_DISK_BYTES:
            raise
        raise TrainError(
            f"the disk is full: {console.size(num_free_bytes)} are free, too little for the checkpoint",
            code="disk_full",
            path=str(directory),
            hint="free some space, or keep fewer checkpoints with max_ckpt_to_keep; the older ones are whole, and "
            "resume_from_checkpoint=true goes on from the newest",
        ) from error


def _num_free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def mark_written(staging: Path, rank: int) -> None:
    """Notes in a staging directory that a rank has written all of its part."""
    (staging / f"{_WRITTEN}{rank}").touch()


def missing_parts(staging: Path, num_ranks: int) -> list[int]:
    """The ranks that have not noted that they have written their part, or whose note is not seen from here."""
    return [rank for rank in range(num_ranks) if not (staging / f"{_WRITTEN}{rank}").exists()]


def commit(staging: Path, state: TrainState) -> Checkpoint:
    """Makes a staging directory, in which every rank has written, a checkpoint. Another of the same step is replaced.

    Returns when it would survive a power cut.
    """
    for mark in staging.glob(f"{_WRITTEN}*"):
        mark.unlink()
    _write_json(staging / _STATE, dataclasses.asdict(state))
    sync_files(staging)
    sizes = {str(path.relative_to(staging)): path.stat().st_size for path in sorted(_files(staging))}
    _write_json(staging / _MANIFEST, {"format": FORMAT, "step": state.step, "files": sizes})
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        _sync(directory)
    _sync(staging)

    final = staging.parent / f"checkpoint-{state.step}"
    replaced = None
    if final.exists():
        replaced = final.with_name(f"{final.name}{_REPLACED}{uuid.uuid4().hex[:8]}")
        final.rename(replaced)
    staging.rename(final)
    _sync(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, state)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a directory.

    Raises:
        ConfigError: there is none, it is of another version, or a file of it is missing or has another size.
    """
    directory = Path(path)
    if directory.name == CLUSTER_NAME and not (directory / _MANIFEST).exists():
        directory = directory.parent  # the inner directory, named as ROLL's users know it
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        state = json.loads((directory / _STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise _incomplete(directory, f"expected manifest.json and state.json: {error}") from error
    if manifest.get("format") != FORMAT:
        raise _incomplete(directory, f"its format is {manifest.get('format')}, expected {FORMAT}")
    for name, size in manifest["files"].items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            raise _incomplete(directory, f"{name} is missing or has another size than the manifest says")
    try:
        return Checkpoint(directory, TrainState(**state))
    except TypeError as error:
        raise _incomplete(directory, f"state.json has other entries than expected: {error}") from error


def find_checkpoints(output_dir: str) -> list[Checkpoint]:
    """The complete checkpoints of an output directory, in the order in which they were saved."""
    found = []
    for path in checkpoints_root(output_dir).glob("checkpoint-*"):
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(ConfigError):
                found.append(read_checkpoint(path))
    return sorted(found, key=lambda checkpoint: (checkpoint.state.saved_at, checkpoint.state.step))


def own_checkpoints(output_dir: str, run_id: str) -> list[Checkpoint]:
    """Those that one run wrote, in the order in which they were saved."""
    return [checkpoint for checkpoint in find_checkpoints(output_dir) if checkpoint.state.run_id == run_id]


def checkpoint_to_resume(config: SFTConfig) -> Checkpoint | None:
    """What `resume_from_checkpoint` asks for: None for a fresh start.

    Raises:
        ConfigError: a path is given, and there is no complete checkpoint.
    """
    wanted = config.resume_from_checkpoint
    if wanted is False:
        return None
    if wanted is True:
        found = find_checkpoints(config.output_dir)
        return found[-1] if found else None
    return read_checkpoint(wanted)


def check_agreement(checkpoint: Checkpoint, now: TrainState) -> None:
    """Raises `ConfigError` where a run cannot go on from a checkpoint, with all that differs."""
    saved = checkpoint.state
    different = [
        f"{TrainState.FIXED[name]}: {getattr(saved, name)} in the checkpoint, {getattr(now, name)} now"
        for name in TrainState.FIXED
        if getattr(saved, name) != getattr(now, name)
    ]
    if different:
        raise ConfigError(
            "the run that wrote this checkpoint is another one: " + "; ".join(different),
            code="other_run",
            path=str(checkpoint.path),
            location="resume_from_checkpoint",
            hint="set these back; or export the checkpoint's model and start a new run with pretrain at that model",
        )


def clean_up(output_dir: str) -> None:
    """Removes what a killed run left half written, and puts back what it was about to replace."""
    root = checkpoints_root(output_dir)
    for path in root.glob(f"checkpoint-*{_REPLACED}*"):
        final = root / path.name.partition(_REPLACED)[0]
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
    for path in root.glob(f"checkpoint-*{_STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_old(output_dir: str, run_id: str, num_to_keep: int) -> None:
    """Removes the oldest checkpoints of a run until `num_to_keep` are left; 0 keeps all.

    The one with the lowest validation loss stays besides, and so do those of other runs.
    """
    if num_to_keep == 0:
        return
    own = own_checkpoints(output_dir, run_id)
    best = best_checkpoint(own)
    for checkpoint in own[:-num_to_keep]:
        if checkpoint == best:
            continue
        # Renamed first: if the removal is cut short, what is left is no checkpoint.
        doomed = checkpoint.path.with_name(f"{checkpoint.path.name}{_STAGING}removed")
        checkpoint.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss, the earliest of equals; None if no validation came with any."""
    validated = [checkpoint for checkpoint in checkpoints if checkpoint.state.val_loss is not None]
    return min(validated, key=lambda checkpoint: (checkpoint.state.val_loss, checkpoint.state.step), default=None)


def _incomplete(directory: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"this is no complete checkpoint: {reason}",
        code="checkpoint",
        path=str(directory),
        hint="name a directory checkpoint-<step>, or set resume_from_checkpoint=true for the newest complete one",
    )


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_files(directory: Path) -> None:
    """Forces every file below a directory to the disk."""
    for path in _files(directory):
        _sync(path)


def _sync(path: Path) -> None:
    """Forces a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
