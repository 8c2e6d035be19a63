"""CPU time of preprocessing for long chats, by number of turns: it should grow as their bytes do.

    python benches/long_chats.py MODEL_DIR [TURNS …]

Each line is a data set of its own, of 4,000 turns in all; loading the tokenizer is in the time.
"""

import json
import random
import resource
import sys
import tempfile
from pathlib import Path

import sft_fast

WORDS = "the of model data training tokens we can see that in practice, however, results vary and this is fine. ".split(
    " "
)
NUM_TURNS = 4000


def chat(generator: random.Random, num_turns: int) -> dict[str, object]:
    """A system prompt, and turns of about 120 and 450 words."""

    def say(role: str, num_words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(generator.choice(WORDS) for _ in range(num_words))}

    turns = [message for _ in range(num_turns) for message in (say("user", 120), say("assistant", 450))]
    return {"messages": [say("system", 30), *turns]}


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(model: str, *turns: str) -> None:
    """Prints a line for each number of turns."""
    generator = random.Random(0)
    for num_turns in map(int, turns or ("5", "20", "80", "160")):
        num_chats = max(NUM_TURNS // num_turns, 1)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "chats.jsonl")
            path.write_text("".join(json.dumps(chat(generator, num_turns)) + "\n" for _ in range(num_chats)))
            start = cpu_seconds()
            report = sft_fast.preprocess(
                path, Path(scratch, "out"), tokenizer=model, sequence_length=1 << 20, num_threads=1
            )
            seconds = cpu_seconds() - start
        print(
            f"{num_turns:4} turns, {report.num_tokens // num_chats:7,} tokens a chat: "
            f"{1e3 * seconds / num_chats:6.2f} ms a chat, {report.num_bytes / 1e6 / seconds:5.1f} MB/cpu-s"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
