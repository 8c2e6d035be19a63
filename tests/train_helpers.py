"""What the tests of training share: a tiny model, records, configurations, and a plain loop to compare with."""

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft_fast import Dataset, ensure_dataset
from sft_fast.config import (
    DataArguments,
    ModelArguments,
    SFTConfig,
    StrategyArguments,
    TrainingArguments,
    ValidationConfig,
    WorkerConfig,
)
from sft_fast.stream import StepStream
from sft_fast.train.network import free_port
from sft_fast.train.optim import learning_rate_schedule, parameter_groups
from sft_fast.train.plan import train_stream
from sft_fast.train.strategy import RankInfo
from sft_fast.train.worker import SFTWorker, TrainStepReport
from tests.conftest import make_tokenizer_dir

# Threads that wait for one another make tiny models slow on a busy machine.
torch.set_num_threads(1)

VOCAB_SIZE = 512
WORDS = "one two three four five sea poem Paris capital blue wide short the of and France still".split()


@contextmanager
def ray_here(num_cpus: int) -> Iterator[Any]:
    """The module `ray`, started on this machine alone: never a cluster that somebody else has started on it."""
    import ray

    ray.init(
        "local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=num_cpus,
        object_store_memory=80 * 2**20,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def make_model(kind: str = "llama", **changes: Any) -> Any:
    """A model of two layers with random weights, large enough that every part of it shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)))


def make_model_dir(directory: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model directory with a tiny tokenizer and random weights in float32."""
    make_tokenizer_dir(directory)
    make_model(kind, **changes).save_pretrained(directory)
    return directory


def write_records(path: Path, num_records: int, seed: int = 0) -> Path:
    """Records of a few words, of many lengths."""
    choose = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(1, most)))

    records = [{"instruction": words(20), "output": words(20)} for _ in range(num_records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A directory with a model and records, and the configurations of runs over them."""

    root: Path
    model_dir: Path
    records: Path

    @classmethod
    def create(cls, root: Path, num_records: int = 24, kind: str = "llama", **changes: Any) -> "Workspace":
        """Makes model and records in a directory."""
        return cls(root, make_model_dir(root / "model", kind, **changes), write_records(root / "r.jsonl", num_records))

    def config(
        self,
        *,
        stage: int = 1,
        packed: bool = True,
        rows: int = 2,
        micro_batches: int = 2,
        ranks: int = 1,
        strategy: StrategyArguments | None = None,
        model: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        validation: bool = False,
        **changes: Any,
    ) -> SFTConfig:
        """A run: by default two epochs in float32 on one rank of the CPU."""
        files = DataArguments(file_name=str(self.records))
        values: dict[str, Any] = {
            "pretrain": str(self.model_dir),
            "sequence_length": 96,
            "output_dir": str(self.root / "out"),
            "logging_dir": str(self.root / "logs"),
            "data_cache_dir": str(self.root / "cache"),
            "num_gpus_per_node": 0,
            "track_with": None,
            "save_steps": 0,
            "eval_steps": 0,
            "system_envs": {"OMP_NUM_THREADS": "1"},
            "validation": ValidationConfig(data_args=dataclasses.replace(files)) if validation else None,
        }
        arguments: dict[str, Any] = {
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "warmup_ratio": 0.2,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": micro_batches,
        }
        return SFTConfig(
            **(values | changes),
            sft_train=WorkerConfig(
                model_args=ModelArguments(
                    **({"dtype": "fp32", "disable_gradient_checkpointing": True} | (model or {}))
                ),
                training_args=TrainingArguments(**(arguments | (training or {}))),
                data_args=files,
                strategy_args=strategy or StrategyArguments(strategy_config={"zero_optimization": {"stage": stage}}),
                device_mapping=list(range(ranks)),
                use_sequence_packing=packed,
                infer_batch_size=2,
            ),
        )


def broken_workspace(root: Path) -> Workspace:
    """A workspace with one record whose letters `zq` have no finite embedding: every other step is sound."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    workspace = Workspace.create(root)
    lines = workspace.records.read_text().splitlines()
    lines[5] = json.dumps({"instruction": "zq", "output": "one two three"})
    workspace.records.write_text("\n".join(lines))
    path = workspace.model_dir / "model.safetensors"
    weights = load_file(path)
    broken_ids = AutoTokenizer.from_pretrained(workspace.model_dir)("zq").input_ids
    weights["model.embed_tokens.weight"][broken_ids] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return workspace


def dataset_of(config: SFTConfig) -> Dataset:
    """The training data set of a run."""
    return Dataset(
        ensure_dataset(config.data_files()["train"], config.data_cache_dir, **config.preprocess_options()).path
    )


def start_worker(config: SFTConfig, checkpoint: Path | None = None, device: str = "cpu") -> SFTWorker:
    """The one rank of a run, in this process."""
    path = dataset_of(config).path
    worker = SFTWorker()
    resumed = None if checkpoint is None else str(checkpoint)
    worker.initialize(
        config,
        RankInfo(master_port=free_port(), device=device),
        path,
        {"validation": path} if config.validation else None,
        resumed,
    )
    return worker


def run_worker(config: SFTConfig, num_steps: int | None = None, device: str = "cpu") -> list[TrainStepReport]:
    """The reports of the first steps of a run, or of all."""
    worker = start_worker(config, device=device)
    try:
        num_steps = train_stream(config, dataset_of(config)).num_steps if num_steps is None else num_steps
        return [worker.train_step(step) for step in range(num_steps)]
    finally:
        worker.close()


def samples_of(stream: StepStream, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids `[1, n]` and targets `[n - 1]` (-100 for none) of each sample of a global step, from `dataset[i]`."""
    packing = stream.packing(step // stream.num_steps_per_epoch)
    for micro_batch in stream.step(step, rows_per_micro_batch=1).micro_batches:
        for row in micro_batch:
            for number in packing[row]:
                sample = stream.dataset[int(number)]
                ids = torch.from_numpy(sample.input_ids.astype("int64"))
                is_label = torch.from_numpy(sample.label_mask.copy())[1:]
                yield ids[None], torch.where(is_label, ids[1:], -100)


def plain_loop(config: SFTConfig, num_steps: int | None = None, device: str = "cpu") -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, by PyTorch and transformers alone: one sample at a time, no packing."""
    from transformers import AutoModelForCausalLM

    stream = train_stream(config, dataset_of(config))
    arguments = config.sft_train.training_args
    model = AutoModelForCausalLM.from_pretrained(config.pretrain, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate)
    learning_rate = learning_rate_schedule(arguments, stream.num_steps)
    smoothing = arguments.label_smoothing_factor
    results = []
    for step in range(stream.num_steps if num_steps is None else num_steps):
        samples = list(samples_of(stream, step))
        num_label_tokens = sum(int((targets != -100).sum()) for _, targets in samples)
        total = 0.0
        for ids, targets in samples:
            ids, targets = ids.to(device), targets.to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(
                logits, targets, ignore_index=-100, reduction="sum", label_smoothing=smoothing
            )
            loss = loss / num_label_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        results.append((total, float(norm)))
    return results
