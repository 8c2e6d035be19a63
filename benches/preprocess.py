"""Preprocessing beside the usual path in Python, in fresh processes: `benches/preprocess.py FILE.jsonl MODEL [MB]`.

The usual path is what SFT trainers do for each record: render the prompt and the whole conversation with transformers,
tokenise both, and mask the prompt. It reads the first MB megabytes (default 5) of the file, since it is slow; sft-fast
reads all of it. The token ids of those records are compared first. Speed is bytes of input by CPU seconds, start-up
included, so no other process can make it look better.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def messages_of(record: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a record of fields or messages."""
    if "messages" in record:
        messages: list[dict[str, str]] = record["messages"]
        return messages
    user = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    return [{"role": "user", "content": user}, {"role": "assistant", "content": record["output"]}]


def usual(lines: list[str], model: str) -> tuple[list[list[int]], dict[str, float]]:
    """Ids by transformers, and what they cost."""
    start, start_cpu = time.perf_counter(), cpu_seconds()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = []
    for line in lines:
        messages = messages_of(json.loads(line))
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        full_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        _labels = [-100] * len(prompt_ids) + full_ids[len(prompt_ids) :]
        ids.append(full_ids)
    return ids, cost(start, start_cpu)


def ours(file: str, model: str, num_threads: int) -> tuple[list[list[int]], dict[str, float]]:
    """Ids by sft-fast, and what the whole file costs, shards written."""
    start, start_cpu = time.perf_counter(), cpu_seconds()
    import sft_fast

    with tempfile.TemporaryDirectory() as directory:
        report = sft_fast.preprocess(
            file,
            Path(directory) / "out",
            tokenizer=model,
            sequence_length=1 << 20,
            query_key="input",
            num_threads=num_threads,
        )
        spent = cost(start, start_cpu)
        dataset = sft_fast.Dataset(report.path)
        return [dataset[index].input_ids.tolist() for index in range(min(len(dataset), 20_000))], spent


def cost(start: float, start_cpu: float) -> dict[str, float]:
    """Wall time, CPU time and peak memory (MB) since the start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - start_cpu, "peak": peak}


def main(file: str, model: str, num_megabytes: str = "5") -> None:
    """Measures, compares and prints."""
    lines, num_bytes = [], 0
    with Path(file).open(encoding="utf-8") as records:
        for line in records:
            if num_bytes > float(num_megabytes) * 1e6:
                break
            lines.append(line)
            num_bytes += len(line.encode())
    num_all_bytes = Path(file).stat().st_size

    def fresh(function: Any, *arguments: Any) -> Any:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)

    expected, spent = fresh(usual, lines, model)
    print(f"{Path(file).name}: {num_all_bytes / 1e6:.0f} MB; the usual path reads {num_bytes / 1e6:.1f} MB of it")
    base = num_bytes / 1e6 / spent["cpu"]
    print(f"usual path    {base:7.2f} MB/cpu-s  {spent['wall']:6.2f} s  peak {spent['peak']:5.0f} MB")
    for num_threads in (1, 2):
        found, spent = fresh(ours, file, model, num_threads)
        assert expected[: len(found)] == found[: len(expected)], "the token ids differ"
        rate = num_all_bytes / 1e6 / spent["cpu"]
        print(
            f"sft-fast, {num_threads} th. {rate:7.2f} MB/cpu-s  {spent['wall']:6.2f} s  peak {spent['peak']:5.0f} MB"
            f"  {rate / base:.0f} times"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
