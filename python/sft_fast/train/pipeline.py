"""A whole run, from records to a model: `SFTPipeline(config).run()`.

The driver sends step numbers and takes reports; data and tensors never pass through it. Here is what is around the
steps: data sets, checkpoints to go on from, ranks that are started, and started again. The steps are in `loop.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sft_fast import Dataset, Report, Source, ensure_dataset
from sft_fast.config import resolved_yaml
from sft_fast.console import PreprocessProgress, count, print_report, seconds, stdout_console
from sft_fast.errors import ConfigError, SftFastError
from sft_fast.mixing import shares
from sft_fast.train.checkpoint import (
    CLUSTER_NAME,
    Checkpoint,
    TrainState,
    best_checkpoint,
    check_agreement,
    checkpoint_to_resume,
    clean_up,
    own_checkpoints,
    staging_directory,
)
from sft_fast.train.cluster import Cluster
from sft_fast.train.failure import may_be_mended
from sft_fast.train.loop import Outputs, TrainLoop
from sft_fast.train.metrics import StepFile
from sft_fast.train.placement import Layout
from sft_fast.train.plan import BatchArithmetic, train_stream, validation_stream
from sft_fast.train.progress import RunProgress, logger, open_log_file
from sft_fast.train.ranks import LocalCluster, Ranks
from sft_fast.train.strategy import check_strategy
from sft_fast.train.strategy.universal import convert_checkpoint
from sft_fast.train.tracking import Tracker, create_tracker

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig


@dataclass(frozen=True)
class _Data:
    """What is trained on."""

    num_steps: int  # of the whole run
    train_path: str
    train_sources: tuple[Source, ...]  # how much of each an epoch uses
    val_paths: dict[str, str]  # by source; empty where there is no validation


class SFTPipeline:
    """The driver of a run."""

    def __init__(self, config: SFTConfig, *, use_ray: bool = True) -> None:
        """Checks what can be checked without work.

        Args:
            config: the run.
            use_ray: False runs the one rank in this process.

        Raises:
            ConfigError: the strategy, its settings or the model directory are wrong.
        """
        self._zero_stage = check_strategy(config)
        _check_model_directory(config.pretrain)
        if config.tensor_parallel_size * config.sequence_parallel_size > 1:
            from sft_fast.train.model import load_config
            from sft_fast.train.strategy.layout import check_layout

            check_layout(config, load_config(config.pretrain, config.sft_train.model_args.model_config_kwargs))
        self._config = config
        self._use_ray = use_ray
        self._run_directory = Path(config.logging_dir) / config.exp_name
        self._stop_signal: str | None = None
        self._last_step = 0  # how far the ranks came
        self._began: Layout | None = None  # on which machines, once they have been found

    def run(self) -> None:
        """Preprocesses what the cache lacks, trains, validates, saves, exports.

        Raises:
            SftFastError: what went wrong. Of a rank that fails, the first cause.
        """
        config = self._config
        reports = self._ensure_datasets()
        report = reports["train"]
        stream = train_stream(config, Dataset(report.path, report.sources))
        val_paths = {source: reports[source].path for source in config.validation_sources()}
        for path in val_paths.values():
            validation_stream(config, Dataset(path))  # whatever is wrong with it shows before training
        data = _Data(stream.num_steps, report.path, report.sources, val_paths)
        arithmetic = BatchArithmetic.of(config, stream)
        print_report(stdout_console(), report, "train data", [*arithmetic.rows(), *device_rows(config)])

        clean_up(config.output_dir)
        state = self._initial_state(report)
        resumed = checkpoint_to_resume(config)
        if resumed is not None:
            check_agreement(resumed, state)
            state = replace(state, run_id=resumed.state.run_id)

        log_file = open_log_file(self._run_directory / "train.log")
        with contextlib.ExitStack() as stack:
            stack.callback(log_file.close)
            stack.callback(logger.removeHandler, log_file)
            (self._run_directory / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            content = {"data": {name: asdict(report) for name, report in reports.items()}, "plan": asdict(arithmetic)}
            (self._run_directory / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            tracker = self._create_tracker()
            stack.callback(tracker.finish)
            try:
                self._train_with_restarts(data, resumed, state, tracker)
            except SftFastError as error:
                logger.error(str(error))
                raise

    def _train_with_restarts(
        self, data: _Data, resumed: Checkpoint | None, initial: TrainState, tracker: Tracker
    ) -> None:
        """Trains; where a process or a machine fails, once more from the last checkpoint, `max_restarts` times."""
        config = self._config
        for num_restarts_left in range(config.max_restarts, -1, -1):
            state = initial if resumed is None else _state_after(resumed, initial)
            with contextlib.ExitStack() as stack:
                metrics = StepFile(self._run_directory / "metrics.jsonl", state.step)
                stack.callback(metrics.close)
                generations = None
                if config.validation is not None and config.validation.num_generations:
                    generations = StepFile(self._run_directory / "generations.jsonl", state.step)
                    stack.callback(generations.close)
                progress = RunProgress(data.num_steps, state.step)
                stack.callback(progress.close)
                self._last_step = state.step
                try:
                    self._train(data, resumed, state, Outputs(metrics, generations, tracker, progress))
                    return
                except SftFastError as error:
                    # What fails before it has done a single step will fail again, unless it is for a machine.
                    has_got_on = self._last_step > state.step or error.code == "machine_lost"
                    if not (num_restarts_left and has_got_on and may_be_mended(error)):
                        raise
                    own = own_checkpoints(config.output_dir, state.run_id)
                    resumed = own[-1] if own else resumed
                    progress.note(
                        f"{error}\nstarting again, {count(num_restarts_left - 1)} more times at most (max_restarts)"
                    )

    def _train(self, data: _Data, resumed: Checkpoint | None, state: TrainState, outputs: Outputs) -> None:
        """Starts the ranks, trains to the end and exports."""
        config, progress = self._config, outputs.progress
        if resumed is not None:
            progress.note(f"resuming after step {count(state.step)} from {resumed.path}")
        elif config.resume_from_checkpoint:
            progress.note(f"no complete checkpoint under {config.output_dir}: starting from {config.pretrain}")
        start = time.perf_counter()
        cluster = self._start_ranks(progress)
        try:
            config = cluster.config
            self._check_shared(cluster, data, resumed)
            with self._loadable(config, resumed, progress) as (checkpoint, is_universal):
                cluster.initialize(
                    config, data.train_path, data.val_paths, checkpoint, is_universal, data.train_sources
                )
            places = f" on {count(cluster.num_machines)} machines" if cluster.num_machines > 1 else ""
            progress.note(f"ranks ready: {cluster.world_size}{places}, after {seconds(time.perf_counter() - start)}")
            state = replace(state, world_size=config.sft_train.world_size)
            has_validation = bool(data.val_paths)
            loop = TrainLoop(config, cluster, data.num_steps, has_validation, state, outputs, lambda: self._stop_signal)
            try:
                with self._catching_signals():
                    loop.run()
            finally:
                self._last_step = loop.state.step
            best = best_checkpoint(own_checkpoints(config.output_dir, state.run_id))
            if best is not None:
                progress.note(f"lowest validation loss of a checkpoint: {best.state.val_loss:.4f}, {best.path}")
            if config.export_dir is not None:
                cluster.submit("export", config.export_dir).result()
                progress.note(f"the model is in {config.export_dir}")
        finally:
            cluster.shutdown()
            clean_up(config.output_dir)  # of the checkpoint that was being written, where an error ended the run

    def _start_ranks(self, progress: RunProgress) -> Ranks:
        """The ranks, on all machines; when the run starts again, on those that are there."""
        if not self._use_ray:
            return LocalCluster(self._config)
        cluster = Cluster(self._config, self._began, progress.note)
        self._began = self._began or cluster.layout
        return cluster

    def _check_shared(self, cluster: Ranks, data: _Data, resumed: Checkpoint | None) -> None:
        """Makes sure that each machine has what its ranks are about to read, and writes where the others do."""
        config = self._config
        paths = {"the model": config.pretrain, "the training data": data.train_path}
        paths |= {f"the data of {name}": path for name, path in data.val_paths.items()}
        if resumed is not None:
            paths["the checkpoint"] = str(resumed.path)
        cluster.check_shared(paths, [config.output_dir, config.logging_dir])

    @contextlib.contextmanager
    def _loadable(
        self, config: SFTConfig, resumed: Checkpoint | None, progress: RunProgress
    ) -> Iterator[tuple[str | None, bool]]:
        """The directory to load (None for a fresh start), and whether it was converted for the ranks of `config`."""
        is_for_any = config.sft_train.strategy_args.strategy_name == "fsdp2_train"
        now = (config.sft_train.world_size, config.tensor_parallel_size)
        if resumed is None or is_for_any or now == (resumed.state.world_size, resumed.state.tensor_parallel_size):
            yield None if resumed is None else str(resumed.path), False
            return
        progress.note(
            "converting the checkpoint of "
            + _layout(resumed.state.world_size, resumed.state.tensor_parallel_size)
            + f" for {_layout(*now)}"
        )
        converted = staging_directory(config.output_dir, resumed.state.step)
        try:
            convert_checkpoint(resumed.path / CLUSTER_NAME, converted / CLUSTER_NAME)
            yield str(converted), True
        finally:
            shutil.rmtree(converted, ignore_errors=True)

    def _ensure_datasets(self) -> dict[str, Report]:
        """Finds or makes the data sets."""
        config = self._config
        reports = {}
        for name, files in config.data_files().items():
            with PreprocessProgress(f"{name} data") as progress:
                reports[name] = ensure_dataset(
                    files, config.data_cache_dir, progress=progress, **config.preprocess_options()
                )
            if name != "train":  # which is shown with the plan of the run
                print_report(stdout_console(), reports[name], f"{name} data")
        return reports

    def _initial_state(self, report: Report) -> TrainState:
        """The state of a run of which nothing is done."""
        config = self._config
        data_seed = config.sft_train.training_args.data_seed
        assert data_seed is not None, "filled when the configuration was made"
        return TrainState(
            fingerprint=report.fingerprint,
            seed=config.seed,
            data_seed=data_seed,
            sequence_length=config.sequence_length,
            is_packed=config.sft_train.use_sequence_packing,
            num_rows_per_step=config.num_rows_per_step,
            mix=[list(share) for share in shares(report.sources) or ()],
            model_args=config.to_dict()["sft_train"]["model_args"],
            step=0,
            run_id=uuid.uuid4().hex,
            best_val_loss=None,
            world_size=config.sft_train.world_size,
            tensor_parallel_size=config.tensor_parallel_size,
            strategy_name=config.sft_train.strategy_args.strategy_name,
            zero_stage=self._zero_stage,
            pretrain=os.path.abspath(config.pretrain),
            saved_at=0.0,
        )

    def _create_tracker(self) -> Tracker:
        config = self._config
        return create_tracker(
            config.track_with,
            config.tracker_kwargs,
            exp_name=config.exp_name,
            run_directory=self._run_directory,
            resolved_config=resolved_yaml(config),
        )

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 end the run after the step under way, with a checkpoint."""

        def stop(number: int, _frame: FrameType | None) -> None:
            self._stop_signal = signal.Signals(number).name

        numbers = (signal.SIGTERM, signal.SIGUSR1)
        try:
            before = [signal.signal(number, stop) for number in numbers]
        except ValueError:  # not in the main thread, where signals arrive
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def device_rows(config: SFTConfig) -> list[tuple[str, str]]:
    """What a run asks of each device, for a table: memory, and what the CPU is slow at. Loads torch."""
    return [*_memory_rows(config), *_slow_rows(config)]


def _slow_rows(config: SFTConfig) -> list[tuple[str, str]]:
    """A type of numbers that the CPU has no instructions for: torch takes ten times as long then, and says nothing."""
    import torch

    is_bf16 = config.sft_train.model_args.dtype == "bf16" and config.num_gpus_per_node == 0
    if not is_bf16 or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return []
    return [("slow", "this CPU has no instructions for bf16: model_args.dtype=fp32 is ten times as fast")]


def _memory_rows(config: SFTConfig) -> list[tuple[str, str]]:
    """Where the need cannot be known, the row says why."""
    try:
        from sft_fast.train.estimate import estimate_memory

        return estimate_memory(config, check_strategy(config)).rows()
    except Exception as error:  # nothing that goes wrong here is a reason not to train
        return [("memory a device", f"no estimate: {error}".splitlines()[0])]


def _state_after(resumed: Checkpoint, initial: TrainState) -> TrainState:
    """Where a run stands that goes on from a checkpoint: what has happened is the checkpoint's, the rest is of now."""
    done = resumed.state
    return replace(
        initial,
        step=done.step,
        run_id=done.run_id,
        best_val_loss=done.best_val_loss,
        num_skipped_steps=done.num_skipped_steps,
        num_evals_without_gain=done.num_evals_without_gain,
    )


def _layout(world_size: int, tensor_parallel_size: int) -> str:
    split = f" with weights split over {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
    return f"{world_size} ranks{split}"


def _check_model_directory(path: str) -> None:
    """The mistakes that are quick to see; the rest shows when the model is loaded."""
    for name, what in (("", "model directory"), ("config.json", "configuration"), ("tokenizer.json", "tokenizer")):
        if not os.path.exists(os.path.join(path, name)):
            raise ConfigError(
                f"there is no {what} here",
                code="model",
                path=os.path.join(path, name).rstrip("/"),
                location="pretrain",
                hint="pretrain is a directory with config.json, weights and tokenizer.json; nothing is downloaded",
            )
