"""A batch of conversations to text and ids, beside `apply_chat_template`: `python benches/chat_template.py MODEL FILE`.

FILE holds records with `messages`, such as `benches/corpus.py` makes. CPU time of the process, all threads, and wall
time, of the call alone, the best of three. Texts and ids are compared with those of transformers where it makes them.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoTokenizer

import sft_fast

# transformers is slow at ids: of so many conversations it gets the first tenth.
NUM_CONVERSATIONS = 20_000


def measure(name: str, num_bytes: int, call: Callable[[], Any]) -> Any:
    """Prints megabytes a second of the best run, and returns what the call made."""
    best_cpu = best_wall = float("inf")
    for _ in range(3):
        result = None  # frees that of the run before, whose memory is used again
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        best_cpu = min(best_cpu, time.process_time() - cpu)
        best_wall = min(best_wall, time.perf_counter() - wall)
    print(f"| {name} | {num_bytes / best_cpu / 1e6:.1f} | {num_bytes / best_wall / 1e6:.1f} |", flush=True)
    return result


def main(model: str, file: str) -> None:
    """Measures and prints a table."""
    with open(file, encoding="utf-8") as lines:
        records = map(json.loads, itertools.islice(lines, NUM_CONVERSATIONS))
        conversations = [record["messages"] for record in records]
    few = conversations[: len(conversations) // 10]
    num_all, num_few = (sum(len(json.dumps(messages)) for messages in batch) for batch in (conversations, few))
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = sft_fast.ChatTemplate.from_pretrained(model)
    reference = partial(tokenizer.apply_chat_template, few)

    print(f"{len(conversations)} conversations, {num_all / 1e6:.0f} MB of JSON; {len(few)} of them for transformers\n")
    print("| | MB/cpu-s | MB/s |\n|---|---|---|")
    texts = measure("apply_chat_template, text", num_few, partial(reference, tokenize=False))
    ids = measure("apply_chat_template, ids", num_few, partial(reference, return_dict=True))["input_ids"]
    for num_threads in (1, 2):
        threads = f"{num_threads} thread{'s' * (num_threads > 1)}"
        call = partial(template.render_batch, conversations, num_threads=num_threads)
        assert [text for text, _ in measure(f"render_batch, {threads}", num_all, call)[: len(few)]] == texts
        call = partial(template.encode_batch, conversations, num_threads=num_threads)
        made = measure(f"encode_batch, {threads}", num_all, call)[: len(few)]
        assert [found.tolist() for found, _ in made] == ids
    print("\ntexts and ids are equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
