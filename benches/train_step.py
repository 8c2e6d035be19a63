"""A training step beside a bare PyTorch loop and beside padding, on the CPU: `benches/train_step.py MODEL FILE`.

MODEL is a directory with a tokenizer, FILE has records. The model has random weights: 4 layers, and the vocabulary of
the tokenizer. Three ways to train on the same samples take turns, step by step, so that whatever else the machine does
meets all of them; their losses are compared before any time is believed. On one thread.

* ours: `SFTWorker.train_step`, with DeepSpeed, prefetching and metrics
* bare: a loop over the very same packs with the same model function, and torch's AdamW and clipping
* padded: `transformers` as it is, 8 samples a micro-batch, padded to the longest, all logits

Then the loss alone, in chunks and whole, each in a process of its own, whose memory is read at its end.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from sft_fast.config import DataArguments, ModelArguments, SFTConfig, TrainingArguments, WorkerConfig
from sft_fast.train.batch import make_micro_batch
from sft_fast.train.loss import cross_entropy_sum
from sft_fast.train.model import SFTModel, load_model
from sft_fast.train.optim import make_optimizer
from sft_fast.train.plan import train_stream
from tests.train_helpers import dataset_of, samples_of, start_worker

SEQUENCE_LENGTH, ROWS, MICRO_BATCHES = 1024, 1, 2
PADDED_ROWS = 8
SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
NUM_LABEL_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 2048, 256, 151_936

# What a step gives: its loss.
Step = Callable[[int], float]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--memory-of", choices=("chunked", "whole"), help="used by itself")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_loss(arguments.memory_of)))
        return
    with tempfile.TemporaryDirectory() as directory:
        steps(make_config(arguments.model, arguments.file, Path(directory)), arguments.steps)
    for kind in ("chunked", "whole"):
        command = [sys.executable, __file__, str(arguments.model), str(arguments.file), "--memory-of", kind]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"loss, {kind:8} {found['mib']:7.0f} MiB  {found['seconds']:6.2f} s  gradient {found['norm']:.6f}")


def make_config(tokenizer: Path, file: Path, directory: Path) -> SFTConfig:
    """A run in float32 on one rank, over a model of random weights."""
    model_dir = directory / "model"
    vocab_size = len(json.loads((tokenizer / "tokenizer.json").read_bytes())["model"]["vocab"]) + 1024
    shape: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "vocab_size": vocab_size, "tie_word_embeddings": True}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape)).save_pretrained(model_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_dir / name).write_bytes((tokenizer / name).read_bytes())
    return SFTConfig(
        pretrain=str(model_dir),
        sequence_length=SEQUENCE_LENGTH,
        data_cache_dir=str(directory / "data"),
        logging_dir=str(directory / "logs"),
        too_long="truncate",
        query_key="input",
        num_gpus_per_node=0,
        sft_train=WorkerConfig(
            model_args=ModelArguments(dtype="fp32", disable_gradient_checkpointing=True),
            training_args=TrainingArguments(
                learning_rate=1e-3, per_device_train_batch_size=ROWS, gradient_accumulation_steps=MICRO_BATCHES
            ),
            data_args=DataArguments(file_name=str(file), template="chatml"),
            use_sequence_packing=True,
        ),
    )


def steps(config: SFTConfig, num_steps: int) -> None:
    """Lets the three take turns, compares their losses and prints their times beside each other."""
    stream = train_stream(config, dataset_of(config))
    worker = start_worker(config)
    ways: dict[str, Step] = {
        "ours": lambda step: worker.train_step(step).loss,
        "bare": bare(config, stream),
        "padded": padded(config, stream),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for step in range(num_steps):
        losses = {}
        for name in names[step % 3 :] + names[: step % 3]:  # nobody is always the one after another
            start = time.perf_counter()
            losses[name] = ways[name](step)
            seconds[name].append(time.perf_counter() - start)
        for name, loss in losses.items():
            assert abs(loss / losses["padded"] - 1) < 1e-4, f"step {step}: {losses}"
            assert name != "bare" or abs(loss / losses["ours"] - 1) < 1e-5, f"step {step}: {losses}"
    worker.close()

    plans = [stream.step(step, rows_per_micro_batch=ROWS) for step in range(num_steps)]
    num_tokens = sum(plan.num_tokens for plan in plans[2:])
    lengths = [len(ids[0]) for step in range(num_steps) for ids, _ in samples_of(stream, step)]
    print(
        f"{num_steps} steps, {len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, median "
        f"{statistics.median(lengths):.0f}; losses agree"
    )
    for name, times in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(times[2:], seconds["bare"][2:], strict=True)]
        print(
            f"{name:8} {num_tokens / sum(times[2:]):8,.0f} tokens/s, a step takes "
            f"{statistics.median(ratios):.3f} times that of the bare loop (median of pairs)"
        )


def bare(config: SFTConfig, stream: Any) -> Step:
    """The loop that one would write by hand, over packs that are ready."""
    model = SFTModel(load_model(config.pretrain, config.sft_train.model_args)).train()
    optimizer = make_optimizer(model, config.sft_train.training_args)
    learning_rate = learning_rates(config, stream)

    def step_of(step: int) -> float:
        plan = stream.step(step, rows_per_micro_batch=ROWS)
        total = 0.0
        for index in range(len(plan.micro_batches)):
            batch = make_micro_batch(stream.batch(plan, index))
            arguments = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            loss = model(**arguments, factor=1 / plan.num_label_tokens)
            loss.backward()
            total += loss.item()
        update(model, optimizer, config, learning_rate(step + 1))
        return total

    return step_of


def padded(config: SFTConfig, stream: Any) -> Step:
    """What `transformers` does with rows that are padded to the longest of their micro-batch."""
    model = AutoModelForCausalLM.from_pretrained(config.pretrain, dtype=torch.float32).train()
    optimizer = make_optimizer(model, config.sft_train.training_args)
    learning_rate = learning_rates(config, stream)

    def step_of(step: int) -> float:
        samples = [(ids[0], targets) for ids, targets in samples_of(stream, step)]
        num_label_tokens = sum(int((targets != -100).sum()) for _, targets in samples)
        total = 0.0
        for first in range(0, len(samples), PADDED_ROWS):
            rows = samples[first : first + PADDED_ROWS]
            ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True)
            targets = nn.utils.rnn.pad_sequence([t for _, t in rows], batch_first=True, padding_value=-100)
            lengths = torch.tensor([len(ids) for ids, _ in rows])
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_label_tokens
            loss.backward()
            total += loss.item()
        update(model, optimizer, config, learning_rate(step + 1))
        return total

    return step_of


def learning_rates(config: SFTConfig, stream: Any) -> Callable[[int], float]:
    """The learning rate of each step."""
    from sft_fast.train.optim import learning_rate_schedule

    return learning_rate_schedule(config.sft_train.training_args, stream.num_steps)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, config: SFTConfig, learning_rate: float) -> None:
    """Clips and steps."""
    nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


def measure_loss(kind: str) -> dict[str, float]:
    """Peak memory beyond the inputs, time, and the norm of the gradients, of one forward and backward pass."""
    torch.manual_seed(0)
    hidden = torch.randn(NUM_LABEL_TOKENS, HIDDEN_SIZE, requires_grad=True)
    weight = (torch.randn(VOCAB_SIZE, HIDDEN_SIZE) * 0.02).requires_grad_()
    targets = torch.randint(VOCAB_SIZE, (NUM_LABEL_TOKENS,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = memory("VmRSS"), time.perf_counter()
    if kind == "chunked":
        loss = cross_entropy_sum(hidden, weight, targets)
    else:
        loss = cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    gradients = torch.autograd.grad(loss, (hidden, weight))
    seconds = time.perf_counter() - start
    kibibytes = memory("VmHWM") - before
    norm = sum(float(gradient.norm()) ** 2 for gradient in gradients) ** 0.5
    return {"mib": kibibytes / 1024, "seconds": seconds, "norm": norm}


def memory(name: str) -> int:
    """KiB of this process: `VmRSS`, those in use now, or `VmHWM`, the most so far."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


if __name__ == "__main__":
    main()
