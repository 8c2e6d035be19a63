"""sft-fast beside the ways from records to tokens that others take, each in a fresh process.

What is measured, and how, stands in docs/benchmarks.md, which `benches/run.py` writes from what `compare` returns.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
LLAMAFACTORY = "llamafactory==0.9.5"
# What a sample has: ids, and whether each is trained on.
Sample = tuple[tuple[int, ...], tuple[bool, ...]]
LONGEST = 1 << 16


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a record."""
    if "messages" in record:
        messages: list[dict[str, Any]] = record["messages"]
        return messages
    user = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    return [{"role": "user", "content": user}, {"role": "assistant", "content": record["output"]}]


def load_json(file: str) -> Any:
    """The file as `datasets` loads it."""
    from datasets import load_dataset

    return load_dataset("json", data_files=file, split="train")


def rows_of(dataset: Any, mask: str) -> list[Sample]:
    """Samples of a tokenised data set; `mask` is its column of labels or of a mask."""
    samples = []
    for row in dataset:
        labels = [label != -100 for label in row["labels"]] if mask == "labels" else [bool(bit) for bit in row[mask]]
        samples.append((tuple(row["input_ids"]), tuple(labels)))
    return samples


def num_cache_bytes(dataset: Any) -> int:
    """What a data set takes on disk."""
    return sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)


def roll(model: str, file: str) -> Callable[[], tuple[Any, str]]:
    """As ROLL does it: two renders and two tokenizer calls a record, one by one, the prompt masked by its length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for values in zip(*batch.values(), strict=True):
            messages = messages_of(dict(zip(batch, values, strict=True)))
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            full = tokenizer(text)
            num_prompt = len(tokenizer(prompt)["input_ids"])
            encoded["input_ids"].append(full["input_ids"])
            encoded["attention_mask"].append(full["attention_mask"])
            encoded["labels"].append([-100] * num_prompt + full["input_ids"][num_prompt:])
        return encoded

    def work() -> tuple[Any, str]:
        dataset = load_json(file)
        return dataset.map(encode, batched=True, remove_columns=dataset.column_names), "labels"

    return work


def datasets_map(model: str, file: str) -> Callable[[], tuple[Any, str]]:
    """`datasets.map` at its best: one render a record, one tokenizer call a batch, labels by offsets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # What stands between is trained on: after the header of an answer, up to the end of its turn.
    answer = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
    if "<|im_start|>" not in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False):
        answer = re.compile(r"(?!)")  # only ids are compared

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        records = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        texts = [tokenizer.apply_chat_template(messages_of(record), tokenize=False) for record in records]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        labels = []
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            row, token = [-100] * len(ids), 0
            for span in answer.finditer(text):
                while offsets[token][1] <= span.start():
                    token += 1
                while token < len(ids) and offsets[token][0] < span.end():
                    row[token] = ids[token]
                    token += 1
            labels.append(row)
        return {"input_ids": encoded["input_ids"], "labels": labels}

    def work() -> tuple[Any, str]:
        dataset = load_json(file)
        return dataset.map(encode, batched=True, remove_columns=dataset.column_names), "labels"

    return work


def trl(model: str, file: str) -> Callable[[], tuple[Any, str]]:
    """TRL's `SFTTrainer` with `assistant_only_loss` and packing by best fit decreasing; its model is a tiny one."""
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tiny = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    output = tempfile.mkdtemp()

    def prepare(dataset: Dataset) -> Any:
        options = {"assistant_only_loss": True, "packing": True, "packing_strategy": "bfd", "max_length": LONGEST}
        options |= {"report_to": [], "use_cpu": True, "bf16": False}
        arguments = SFTConfig(output_dir=output, **options)
        return SFTTrainer(tiny, args=arguments, train_dataset=dataset, processing_class=tokenizer).train_dataset

    def work() -> tuple[Any, str]:
        dataset = load_json(file)
        if "messages" not in dataset.column_names:
            columns = dataset.column_names
            dataset = dataset.map(lambda record: {"messages": messages_of(record)}, remove_columns=columns)
        return prepare(dataset), "labels"

    return work


def llamafactory(model: str, file: str) -> Callable[[], tuple[Any, str]]:
    """LLaMA-Factory's own loading, with its template `qwen`."""
    import torch

    # The torchaudio that it asks for may be built for another CUDA than torch, and then refuses to be imported.
    torch.version.cuda = None
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    directory = Path(tempfile.mkdtemp())
    info: dict[str, Any] = {"file_name": file}
    if '"messages"' in Path(file).read_text(encoding="utf-8").partition("\n")[0]:
        names = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        info |= {"formatting": "sharegpt", "columns": {"messages": "messages"}}
        info["tags"] = names | {"system_tag": "system", "observation_tag": "tool"}
    (directory / "dataset_info.json").write_text(json.dumps({"data": info}))
    options = {"model_name_or_path": model, "stage": "sft", "do_train": True, "finetuning_type": "full"}
    options |= {"dataset": "data", "dataset_dir": str(directory), "template": "qwen", "cutoff_len": LONGEST}
    options |= {"output_dir": str(directory / "out"), "report_to": "none", "bf16": False, "overwrite_cache": True}
    model_arguments, data_arguments, training_arguments, _, _ = get_train_args(options)
    module = load_tokenizer(model_arguments)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_arguments)

    def work() -> tuple[Any, str]:
        loaded = get_dataset(template, model_arguments, data_arguments, training_arguments, stage="sft", **module)
        return loaded["train_dataset"], "labels"

    return work


PEERS = {"ROLL": roll, "datasets.map": datasets_map, "TRL": trl, "LLaMA-Factory": llamafactory}


def child(name: str, model: str, file: str, result: str) -> None:
    """Runs one peer in this process, and writes its figures and samples."""
    work = PEERS[name](model, file)
    start_cpu, start = time.process_time(), time.perf_counter()
    dataset, mask = work()
    figures = {"start_up": start_cpu, "cpu": time.process_time() - start_cpu, "wall": time.perf_counter() - start}
    samples = rows_of(dataset, mask)
    if "seq_lengths" in dataset.column_names:
        packs, samples = samples, []
        for (ids, labels), lengths in zip(packs, dataset["seq_lengths"], strict=True):
            ends = list(itertools.accumulate(lengths, initial=0))
            samples += [(ids[start:end], labels[start:end]) for start, end in itertools.pairwise(ends)]
    figures["num_tokens"] = sum(len(ids) for ids, _ in samples)
    figures["num_disk_bytes"] = num_cache_bytes(dataset)
    figures["is_packed"] = "seq_lengths" in dataset.column_names
    Path(result).write_text(json.dumps({**figures, "samples": samples}))


def run(command: list[Any], work: Path, timeout: float) -> tuple[dict[str, float], str]:
    """CPU seconds, wall seconds and peak memory (MB) of a command, and its last words if it fails."""
    settings = {"HF_DATASETS_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (work / "log").open("w+b") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, cwd=work, env=os.environ | settings
        )
        peak_kilobytes = 0
        while True:
            # Looked at again and again, since `ru_maxrss` also counts what this process had when it started the other.
            try:
                words = Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()
                peak_kilobytes = int(words[0]) if words else peak_kilobytes
            except FileNotFoundError:
                pass
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - start > timeout:
                process.kill()
                os.wait4(process.pid, 0)
                return {}, f"takes more than {timeout:.0f} s"
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    figures = {
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": time.perf_counter() - start,
        "peak": peak_kilobytes * 1024 / 1e6,
    }
    return figures, "" if status == 0 else (lines or ["fails without a word"])[-1][:160]


def run_peer(name: str, model: Path, file: Path) -> dict[str, Any]:
    """Figures and samples of a peer; `error` if it does not work here."""
    python: Any = sys.executable
    if name == "LLaMA-Factory":
        python, error = llamafactory_python()
        if error:
            return {"error": error}
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        result = Path(directory) / "result.json"
        used, error = run([python, __file__, name, model, file, result], Path(directory), 300)
        if error:
            return {"error": error}
        return {**json.loads(result.read_text()), "peak": used["peak"]}


def llamafactory_python() -> tuple[Path, str]:
    """The interpreter that has LLaMA-Factory, in an environment of its own, or why there is none."""
    directory = BUILD / "llamafactory"
    python, done = directory / "bin" / "python", directory / "installed.txt"
    if not done.is_file() or not done.read_text().startswith(LLAMAFACTORY):
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, directory], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python, LLAMAFACTORY]
        try:
            installed = subprocess.run(install, capture_output=True, text=True, timeout=600)
            error = installed.stderr.strip().splitlines()[-1][:160] if installed.returncode else ""
        except subprocess.TimeoutExpired:
            error = "installing takes more than ten minutes"
        done.write_text(f"{LLAMAFACTORY}\n{error}")
    return python, done.read_text().partition("\n")[2]


def run_ours(model: Path, file: Path, num_runs: int, *options: str) -> dict[str, Any]:
    """Figures of the fastest run of `sft-fast preprocess`, start-up included, and where its last data set lies."""
    best: dict[str, Any] = {}
    output = BUILD / "out"
    command = [Path(sys.executable).parent / "sft-fast", "preprocess", file, "--output-dir", output]
    command += ["--tokenizer", model, "--sequence-length", str(LONGEST), "--query-key", "input", *options]
    for _ in range(num_runs):
        shutil.rmtree(output, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as directory:
            used, error = run(command, Path(directory), 300)
        if error:
            return {"error": error}
        if not best or used["cpu"] < best["cpu"]:
            best = used
    manifest = json.loads((output / "manifest.json").read_text())
    num_disk_bytes = sum(path.stat().st_size for path in output.iterdir())
    return {**best, **{key: manifest[key] for key in ("num_tokens", "num_samples")}, "num_disk_bytes": num_disk_bytes}


def our_samples() -> list[Sample]:
    """All samples of the data set that `run_ours` wrote last."""
    import sft_fast

    dataset = sft_fast.Dataset(BUILD / "out")
    return [(tuple(sample.input_ids.tolist()), tuple(sample.label_mask.tolist())) for sample in dataset]


def differences(samples: list[Sample], expected: list[Sample], is_packed: bool) -> tuple[int, int]:
    """How many samples have other ids, and how many of the others have other labels."""
    if len(samples) != len(expected):
        return abs(len(samples) - len(expected)), 0
    if is_packed:
        samples, expected = sorted(samples), sorted(expected)
    num_ids = sum(ours[0] != theirs[0] for ours, theirs in zip(samples, expected, strict=True))
    return num_ids, sum(ours != theirs for ours, theirs in zip(samples, expected, strict=True)) - num_ids


def head(file: Path, name: str, max_bytes: float) -> Path:
    """The first lines of a file, as a file."""
    path = BUILD / name
    num_bytes = 0
    with file.open("rb") as lines, path.open("wb") as output:
        for line in lines:
            num_bytes += len(line)
            if num_bytes > max_bytes:
                break
            output.write(line)
    return path


def row(name: str, file: Path, figures: dict[str, Any], num_samples: int, other: str) -> str:
    """A row of the tables."""
    if "error" in figures:
        return f"| {name} | left out: {figures['error']} | | | | | |"
    num_bytes = file.stat().st_size
    return (
        f"| {name} | {num_bytes / 1e6:.0f} | {num_bytes / 1e6 / figures['cpu']:.2f} "
        f"| {num_samples / figures['wall']:,.0f} | {figures['peak']:.0f} "
        f"| {figures['num_disk_bytes'] / figures['num_tokens']:.1f} | {other} |"
    )


HEADER = [
    "| pipeline | MB | MB/cpu-s | samples/s | peak MB | bytes a token | other ids, labels |",
    "|---|---|---|---|---|---|---|",
]


def compare(model: Path, file: Path, peer_bytes: float, num_runs: int) -> list[str]:
    """Peers on the first bytes of a file, sft-fast on those and on all of it: lines of Markdown."""
    small = head(file, f"peers-{file.name}", peer_bytes)
    lines = list(HEADER)
    reference = run_peer("datasets.map", model, small)
    expected: list[Sample] = [(tuple(ids), tuple(mask)) for ids, mask in reference.pop("samples", [])]
    for name in PEERS:
        print(f"{file.name}: {name} …", file=sys.stderr)
        figures = reference if name == "datasets.map" else run_peer(name, model, small)
        samples = [(tuple(ids), tuple(mask)) for ids, mask in figures.pop("samples", [])] or expected
        other = (
            "the reference"
            if name == "datasets.map"
            else "{}, {}".format(*differences(samples, expected, figures.get("is_packed", False)))
        )
        lines.append(row(name, small, figures, len(expected), other))
    print(f"{file.name}: sft-fast …", file=sys.stderr)
    run_ours(model, small, 1)
    num_ids, num_labels = differences(our_samples(), expected, False)
    if num_ids + num_labels:
        raise SystemExit(f"sft-fast has other ids in {num_ids} samples, other labels in {num_labels}")
    for num_threads in (1, 2):
        ours = run_ours(model, file, num_runs, "--num-threads", str(num_threads))
        lines.append(row(f"sft-fast, {num_threads} threads", file, ours, ours.get("num_samples", 0), "0, 0"))
    return lines


if __name__ == "__main__":
    child(*sys.argv[1:])
