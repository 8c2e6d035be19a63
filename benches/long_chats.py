"""CPU time of preprocessing for long chats, by number of turns: it should grow as their bytes do.

    python benches/long_chats.py MODEL_DIR [TURNS …]

Each line has two data sets: chats of the same number of turns, where what was learned of one serves the next; and
chats of about that many turns, no two of the same number, so that each is the first of its kind. The time of a data
set of one chat alone, loading the tokenizer included, is subtracted.
"""

import itertools
import json
import random
import resource
import sys
import tempfile
from pathlib import Path

import sft_fast

SYLLABLES = "ta ri mon el ca ver sti on per lo ne dra shi un ke pol ana sor it ul".split(" ")
NUM_TURNS = 4000


class Words:
    """Texts of made-up words, of which few are frequent and many are rare, as in a language."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._words = ["".join(generator.choices(SYLLABLES, k=1 + rank % 3)) for rank in range(20_000)]
        self._weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(20_000)))

    def text(self, num_words: int) -> str:
        """So many words."""
        return " ".join(self._generator.choices(self._words, cum_weights=self._weights, k=num_words))


def chat(words: Words, num_turns: int) -> dict[str, object]:
    """A system prompt, and turns of about 80 and 300 words."""

    def say(role: str, num_words: int) -> dict[str, str]:
        return {"role": role, "content": words.text(num_words)}

    turns = [message for _ in range(num_turns) for message in (say("user", 80), say("assistant", 300))]
    return {"messages": [say("system", 30), *turns]}


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def seconds_and_tokens(model: str, chats: list[dict[str, object]]) -> tuple[float, int]:
    """CPU time and tokens of a data set, the best of three."""
    best, num_tokens = float("inf"), 0
    for _ in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "chats.jsonl")
            path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
            start = cpu_seconds()
            report = sft_fast.preprocess(
                path, Path(scratch, "out"), tokenizer=model, sequence_length=1 << 24, num_threads=1
            )
            best, num_tokens = min(best, cpu_seconds() - start), report.num_tokens
    return best, num_tokens


def main(model: str, *turns: str) -> None:
    """Prints a line for each number of turns."""
    words = Words(random.Random(0))
    for num_turns in map(int, turns or ("5", "20", "80", "160")):
        num_chats = max(NUM_TURNS // num_turns, 2)
        alike = [chat(words, num_turns) for _ in range(num_chats)]
        num_unlike = min(num_chats, num_turns)
        unlike = [chat(words, num_turns - num_unlike // 2 + index) for index in range(num_unlike)]
        columns = []
        for chats in (alike, unlike):
            seconds, num_tokens = seconds_and_tokens(model, chats)
            alone, num_alone = seconds_and_tokens(model, chats[:1])
            num_others = len(chats) - 1
            columns.append(
                f"{1e3 * (seconds - alone) / num_others:6.2f} ms for {(num_tokens - num_alone) // num_others:7,} tokens"
            )
        print(f"{num_turns:4} turns: alike {columns[0]}, each the first of its kind {columns[1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
