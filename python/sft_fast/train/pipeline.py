"""A whole run, from records to a model: `SFTPipeline(config).run()`.

The driver sends step numbers and takes reports; data and tensors never pass through it. It hands out the work of a step
before it has read the reports of the one before, so that no device waits for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sft_fast import Dataset, Report, ensure_dataset
from sft_fast.config import resolved_yaml
from sft_fast.console import PreprocessProgress, count, report_table, seconds, stdout_console, two_columns
from sft_fast.errors import ConfigError, SftFastError, TrainError
from sft_fast.train.checkpoint import (
    CLUSTER_NAME,
    Checkpoint,
    TrainState,
    check_agreement,
    checkpoint_to_resume,
    clean_up,
    commit,
    keep_newest,
    naming_a_full_disk,
    staging_directory,
)
from sft_fast.train.cluster import Call, Cluster, LocalCluster, Ranks
from sft_fast.train.metrics import MetricsFile, StepMetrics
from sft_fast.train.plan import BatchArithmetic, train_stream, validation_stream
from sft_fast.train.progress import RunProgress, logger, open_log_file
from sft_fast.train.strategy import check_strategy_name
from sft_fast.train.strategy.deepspeed_config import make_deepspeed_config
from sft_fast.train.strategy.universal import convert_checkpoint
from sft_fast.train.tracking import Tracker, create_tracker

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig
    from sft_fast.train.worker import TrainStepReport, ValStepReport


@dataclass(frozen=True)
class _StepCalls:
    """The work of one step that the ranks have been given."""

    train: Call
    validate: Call | None
    checkpoint: Call | None
    staging: Path | None  # where the checkpoint is being written


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
        check_strategy_name(config.sft_train.strategy_args.strategy_name)
        self._zero_stage = int(make_deepspeed_config(config)["zero_optimization"]["stage"])
        _check_model_directory(config.pretrain)
        self._config = config
        self._use_ray = use_ray
        self._run_directory = Path(config.logging_dir) / config.exp_name
        self._stop_signal: str | None = None

    def run(self) -> None:
        """Preprocesses what the cache lacks, trains, validates, saves, exports.

        Raises:
            SftFastError: what went wrong. Of a rank that fails, the first cause.
        """
        config = self._config
        reports = self._ensure_datasets()
        stream = train_stream(config, Dataset(reports["train"].path))
        num_steps = stream.num_steps
        val_path = reports["validation"].path if "validation" in reports else None
        if val_path is not None:
            validation_stream(config, Dataset(val_path))  # whatever is wrong with it shows before training
        stdout_console().print(two_columns("batch", BatchArithmetic.of(config, stream).rows()))

        clean_up(config.output_dir)
        state = self._initial_state(reports["train"])
        resumed = checkpoint_to_resume(config)
        if resumed is not None:
            check_agreement(resumed, state)
            done = resumed.state
            state = replace(state, step=done.step, run_id=done.run_id, best_val_loss=done.best_val_loss)

        log_file = open_log_file(self._run_directory / "train.log")
        with contextlib.ExitStack() as stack:
            stack.callback(log_file.close)
            stack.callback(logger.removeHandler, log_file)
            (self._run_directory / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
            metrics = MetricsFile(self._run_directory / "metrics.jsonl", state.step)
            stack.callback(metrics.close)
            tracker = self._create_tracker()
            stack.callback(tracker.finish)
            try:
                progress = RunProgress(num_steps, state.step)
                stack.callback(progress.close)
                self._train(num_steps, reports["train"].path, val_path, resumed, state, metrics, tracker, progress)
            except SftFastError as error:
                logger.error(str(error))
                raise

    def _train(
        self,
        num_steps: int,
        train_path: str,
        val_path: str | None,
        resumed: Checkpoint | None,
        state: TrainState,
        metrics: MetricsFile,
        tracker: Tracker,
        progress: RunProgress,
    ) -> None:
        config = self._config
        if resumed is not None:
            progress.note(f"resuming after step {count(state.step)} from {resumed.path}")
        elif config.resume_from_checkpoint:
            progress.note(f"no complete checkpoint under {config.output_dir}: starting from {config.pretrain}")
        with self._loadable(resumed, progress) as (checkpoint, is_universal):
            cluster: Ranks = Cluster(config) if self._use_ray else LocalCluster(config)
            start = time.perf_counter()
            try:
                cluster.initialize(config, train_path, val_path, checkpoint, is_universal)
            except BaseException:
                cluster.shutdown()
                raise
        try:
            progress.note(f"ranks ready: {cluster.world_size}, after {seconds(time.perf_counter() - start)}")
            with self._catching_signals():
                self._loop(cluster, num_steps, val_path is not None, state, metrics, tracker, progress)
            if config.export_dir is not None:
                cluster.submit("export", config.export_dir).result()
                progress.note(f"the model is in {config.export_dir}")
        finally:
            cluster.shutdown()
            clean_up(config.output_dir)  # of the checkpoint that was being written, where an error ended the run

    @contextlib.contextmanager
    def _loadable(self, resumed: Checkpoint | None, progress: RunProgress) -> Iterator[tuple[str | None, bool]]:
        """The directory to load (None for a fresh start), and whether it was converted for this number of ranks."""
        config = self._config
        if resumed is None or resumed.state.world_size == config.sft_train.world_size:
            yield None if resumed is None else str(resumed.path), False
            return
        progress.note(
            f"converting the checkpoint of {resumed.state.world_size} ranks for {config.sft_train.world_size}"
        )
        converted = staging_directory(config.output_dir, resumed.state.step)
        try:
            convert_checkpoint(resumed.path / CLUSTER_NAME, converted / CLUSTER_NAME)
            yield str(converted), True
        finally:
            shutil.rmtree(converted, ignore_errors=True)

    def _loop(
        self,
        cluster: Ranks,
        num_steps: int,
        has_validation: bool,
        state: TrainState,
        metrics: MetricsFile,
        tracker: Tracker,
        progress: RunProgress,
    ) -> None:
        """Steps from `state.step` to the end; each is handed out before the reports of the one before are read."""
        under_way: _StepCalls | None = None
        for step in range(state.step, num_steps):
            is_last = step + 1 == num_steps or self._stop_signal is not None
            calls = self._submit(cluster, step, is_last, has_validation)
            if under_way is not None:
                state = self._finish(under_way, state, metrics, tracker, progress)
            under_way = calls
            if is_last:
                break
        if under_way is not None:
            state = self._finish(under_way, state, metrics, tracker, progress)
        if state.step < num_steps:
            raise TrainError(
                f"stopped by {self._stop_signal} after step {state.step} of {num_steps}; its checkpoint is complete",
                code="stopped",
                hint="resume_from_checkpoint=true goes on from there",
            )

    def _submit(self, cluster: Ranks, step: int, is_last: bool, has_validation: bool) -> _StepCalls:
        """Gives the ranks the work of global step `step`, from 0, and what is due after it."""
        config = self._config
        train = cluster.submit("train_step", step)
        validate, checkpoint, staging = None, None, None
        if has_validation and _is_due(step + 1, config.eval_steps, is_last):
            validate = cluster.submit("val_step")
        if _is_due(step + 1, config.save_steps, is_last):
            staging = staging_directory(config.output_dir, step + 1)
            checkpoint = cluster.submit("do_checkpoint", str(staging))
        return _StepCalls(train, validate, checkpoint, staging)

    def _finish(
        self, calls: _StepCalls, state: TrainState, metrics: MetricsFile, tracker: Tracker, progress: RunProgress
    ) -> TrainState:
        """Waits for the work of a step, records it, and makes its checkpoint one."""
        config = self._config
        trained = calls.train.result()
        val_loss = None if calls.validate is None else _val_loss(calls.validate.result())
        step = self._step_metrics(trained, val_loss)
        best = min((loss for loss in (state.best_val_loss, val_loss) if loss is not None), default=None)
        state = replace(state, step=step.step, best_val_loss=best)

        is_logged = step.step % config.logging_steps == 0 or val_loss is not None or calls.checkpoint is not None
        if is_logged:
            metrics.write(step)
            values = step.values()
            tracker.log({name: value for name, value in values.items() if name != "step"}, step.step)
        progress.step(step, is_logged)
        if calls.checkpoint is not None and calls.staging is not None:
            took = max(calls.checkpoint.result())
            with naming_a_full_disk(calls.staging):
                saved = commit(calls.staging, replace(state, saved_at=time.time()))
            progress.note(f"checkpoint {saved.path}, written in {seconds(took)}")
            keep_newest(config.output_dir, state.run_id, config.max_ckpt_to_keep)
        return state

    def _step_metrics(self, reports: list[TrainStepReport], val_loss: float | None) -> StepMetrics:
        """What the reports of all ranks say together."""
        first = reports[0]
        slowest = max(report.step_seconds for report in reports)
        # Ranks that share one model have the same part of the loss: it counts once.
        loss = sum(report.loss for report in reports) / self._config.model_parallel_size
        return StepMetrics(
            step=first.step,
            epoch=first.epoch,
            loss=loss,
            val_loss=val_loss,
            learning_rate=first.learning_rate,
            grad_norm=first.grad_norm,
            num_tokens=first.num_tokens,
            num_label_tokens=first.num_label_tokens,
            tokens_per_second=first.num_tokens / slowest,
            step_seconds=slowest,
            data_wait_seconds=max(report.data_wait_seconds for report in reports),
        )

    def _ensure_datasets(self) -> dict[str, Report]:
        """Finds or makes the data sets, and shows what is in them."""
        config = self._config
        reports = {}
        for name, files in config.data_files().items():
            with PreprocessProgress(f"{name} data") as progress:
                reports[name] = ensure_dataset(
                    files, config.data_cache_dir, progress=progress, **config.preprocess_options()
                )
            stdout_console().print(report_table(reports[name], f"{name} data"))
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
            model_args=config.to_dict()["sft_train"]["model_args"],
            step=0,
            run_id=uuid.uuid4().hex,
            best_val_loss=None,
            world_size=config.sft_train.world_size,
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


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and step % every == 0)


def _val_loss(reports: list[ValStepReport]) -> float:
    """Mean over the label tokens of the whole validation data."""
    return sum(report.loss_sum for report in reports) / max(1, sum(report.num_label_tokens for report in reports))


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
