"""A real fine-tune beside the Trainer of transformers, on the CPU: `benches/hf_trainer.py MODEL FILE [--steps 20]`.

MODEL is a model directory (SmolLM2-135M-Instruct, which `examples/demo.py` makes), FILE has records. Every way trains
on the same samples in the same steps with the same schedule, in float32, in processes that run one after another:

* ours: `SFTWorker` with DeepSpeed, packs of `sequence_length`
* packed: the Trainer, over the same packs: one row, position ids that restart
* padded: the Trainer as it is mostly used: the samples of the same pack as a batch, padded to the longest

Losses and gradient norms are compared step by step, and the loss over the validation data at the end, before any time
is believed. Tokens are those of the samples, without padding. The first two steps are not timed. Tokens of a second of
the processor count where other work goes on beside.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from sft_fast.config import (
    DataArguments,
    ModelArguments,
    SFTConfig,
    TrainingArguments,
    ValidationConfig,
    WorkerConfig,
)
from sft_fast.train.plan import train_stream, validation_stream
from tests.train_helpers import dataset_of, samples_of, start_worker

SEQUENCE_LENGTH, NUM_VALIDATION_RECORDS, NUM_WARMUP_STEPS = 1024, 48, 2
WAYS = ("ours", "packed", "padded")
# Token ids [1, n] and targets [n - 1].
Sample = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    """Runs each way in a process of its own, compares them and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--directory", type=Path, help="used by itself")
    parser.add_argument("--way", choices=WAYS, help="used by itself")
    arguments = parser.parse_args()
    if arguments.way:
        config = make_config(arguments.model, arguments.directory, arguments.steps)
        found = ours(config) if arguments.way == "ours" else trainer(config, arguments.way)
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (arguments.directory / f"{arguments.way}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        split(arguments.file, directory)
        dataset_of(make_config(arguments.model, directory, arguments.steps))
        for way in WAYS:
            command = [sys.executable, __file__, *map(str, (arguments.model, arguments.file))]
            command += ["--steps", str(arguments.steps), "--directory", name, "--way", way]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"{way} is done", file=sys.stderr)
        report({way: json.loads((directory / f"{way}.json").read_text()) for way in WAYS})


def split(file: Path, directory: Path) -> None:
    """The last records are for validation."""
    text = file.read_text(encoding="utf-8")
    records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    parts = {"train": records[:-NUM_VALIDATION_RECORDS], "val": records[-NUM_VALIDATION_RECORDS:]}
    for name, part in parts.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))


def make_config(model: Path, directory: Path, num_steps: int) -> SFTConfig:
    """The run: one pack a step."""
    return SFTConfig(
        pretrain=str(model),
        sequence_length=SEQUENCE_LENGTH,
        data_cache_dir=str(directory / "data"),
        logging_dir=str(directory / "logs"),
        too_long="truncate",
        query_key="input",
        num_gpus_per_node=0,
        validation=ValidationConfig(data_args=DataArguments(file_name=str(directory / "val.jsonl"))),
        sft_train=WorkerConfig(
            model_args=ModelArguments(dtype="fp32", disable_gradient_checkpointing=True),
            training_args=TrainingArguments(
                learning_rate=2e-5,
                lr_scheduler_type="cosine",
                warmup_steps=NUM_WARMUP_STEPS,
                max_steps=num_steps,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
            ),
            data_args=DataArguments(file_name=str(directory / "train.jsonl")),
            use_sequence_packing=True,
            infer_batch_size=1,
        ),
    )


def validation_samples(config: SFTConfig) -> list[Sample]:
    """Of the validation data, one by one."""
    from sft_fast import Dataset, ensure_dataset

    options = config.preprocess_options()
    path = ensure_dataset(config.data_files()["validation"], config.data_cache_dir, **options).path
    stream = validation_stream(config, Dataset(path))
    return [sample for step in range(stream.num_steps) for sample in samples_of(stream, step)]


def mean_loss(model: Any, samples: list[Sample]) -> float:
    """Over the label tokens of all samples."""
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        for ids, targets in samples:
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            num_tokens += int((targets != -100).sum())
    return total / num_tokens


def ours(config: SFTConfig) -> dict[str, Any]:
    """Losses, norms, seconds of each step."""
    worker = start_worker(config)
    reports, cpu_seconds = [], []
    for step in range(config.sft_train.training_args.max_steps):
        start = time.process_time()
        reports.append(worker.train_step(step))
        cpu_seconds.append(time.process_time() - start)
    model = worker._strategy.model.hf_model.eval()
    model.set_attn_implementation("sdpa")
    return {
        "losses": [report.loss for report in reports],
        "norms": [report.grad_norm for report in reports],
        "seconds": [report.step_seconds for report in reports],
        "cpu_seconds": cpu_seconds,
        "num_tokens": [report.num_tokens for report in reports],
        "val_loss": mean_loss(model, validation_samples(config)),
    }


def trainer(config: SFTConfig, way: str) -> dict[str, Any]:
    """The same by the Trainer of transformers."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
    from transformers import TrainingArguments as TheirArguments

    arguments = config.sft_train.training_args
    stream = train_stream(config, dataset_of(config))
    steps = [list(samples_of(stream, step)) for step in range(arguments.max_steps)]
    losses: list[float] = []
    norms: list[float] = []
    times: list[float] = []
    cpu_times: list[float] = []

    class InOrder(Trainer):
        """Takes the steps as they come, and keeps each loss unrounded."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(steps)  # type: ignore[arg-type]

        def training_step(self, *values: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*values, **named)
            losses.append(loss.item())
            return loss

    class Clock(TrainerCallback):
        """Seconds at which a step begins and ends."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            cpu_times.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]
            cpu_times[-1] = time.process_time() - cpu_times[-1]

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            norms.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    model = AutoModelForCausalLM.from_pretrained(config.pretrain, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as directory:
        settings = TheirArguments(
            output_dir=directory,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=1,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type=arguments.lr_scheduler_type,
            warmup_steps=arguments.warmup_steps,
            weight_decay=arguments.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        collate = packed_row if way == "packed" else padded_batch
        InOrder(
            model,
            settings,
            train_dataset=steps,  # type: ignore[arg-type]
            data_collator=lambda batch: collate(batch[0]),
            callbacks=[Clock()],
        ).train()
    return {
        "losses": losses,
        "norms": norms,
        "seconds": times,
        "cpu_seconds": cpu_times,
        "num_tokens": [sum(ids.shape[1] for ids, _ in samples) for samples in steps],
        "val_loss": mean_loss(model.eval(), validation_samples(config)),
    }


def labels_of(samples: list[Sample]) -> Iterator[torch.Tensor]:
    """As transformers wants them: at the place of each token, -100 at the first."""
    for _, targets in samples:
        yield torch.cat([torch.tensor([-100]), targets])


def packed_row(samples: list[Sample]) -> dict[str, Any]:
    """All samples end to end in one row, with position ids that restart."""
    return {
        "input_ids": torch.cat([ids[0] for ids, _ in samples])[None],
        "labels": torch.cat(list(labels_of(samples)))[None],
        "position_ids": torch.cat([torch.arange(ids.shape[1]) for ids, _ in samples])[None],
        "use_cache": False,
    }


def padded_batch(samples: list[Sample]) -> dict[str, Any]:
    """A row a sample, padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [ids[0] for ids, _ in samples]
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(list(labels_of(samples)), batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
    }


def report(found: dict[str, dict[str, Any]]) -> None:
    """The table, and the largest differences from ours."""
    first = found["ours"]
    for way in WAYS[1:]:
        for name in ("losses", "norms"):
            assert len(found[way][name]) == len(first[name])
            pairs = zip(found[way][name], first[name], strict=True)
            worst = max(abs(theirs / mine - 1) for theirs, mine in pairs)
            print(f"{way}: {name} differ from ours by {worst:.1e} at most, relative")
    num_tokens = sum(first["num_tokens"][2:])
    print(f"{len(first['losses'])} steps of {statistics.mean(first['num_tokens']):,.0f} tokens on the mean")
    print("| way | loss of steps 1, 5, 10, ... | validation loss | tokens/s | tokens/cpu-s | beside ours | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        one = found[way]
        curve = [loss for step, loss in enumerate(one["losses"], start=1) if step == 1 or step % 5 == 0]
        cpu_rate, own_cpu_rate = (num_tokens / sum(values["cpu_seconds"][2:]) for values in (one, first))
        print(
            f"| {way} | {', '.join(f'{loss:.4f}' for loss in curve)} | {one['val_loss']:.4f} | "
            f"{num_tokens / sum(one['seconds'][2:]):,.0f} | {cpu_rate:,.0f} | {cpu_rate / own_cpu_rate:.2f} | "
            f"{one['memory'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
