"""Records to measure with, made of text that is on this machine: `make` writes alpaca.jsonl and messages.jsonl.

The text is what Python's library, the installed packages and /usr/share/doc hold. It is real, but one kind of text, and
has hardly any Chinese: for figures that mean something give a corpus of your own.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CHINESE = re.compile("[\u4e00-\u9fff]")
ASKS = (
    "Explain this.",
    "What does the following do?",
    "Continue:",
    "Summarise the text below in {} sentences.",
    "请解释：",
)


def paragraphs(max_bytes: float) -> list[str]:
    """Pieces of files, shuffled."""
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc"]
    kinds = {".py", ".md", ".rst", ".txt", ".pyi", ".h", ""}
    files = [path for root in roots for path in sorted(Path(root).rglob("*")) if path.suffix in kinds]
    random.Random(1).shuffle(files)
    found, num_bytes = {}, 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size < 500_000 else ""
        except (OSError, UnicodeDecodeError):
            continue
        for piece in re.split(r"\n\s*\n", text):
            if 40 <= len(piece) <= 3_000 and piece not in found:
                found[piece] = None
                num_bytes += len(piece)
        if num_bytes > max_bytes:
            break
    pieces = list(found)
    random.Random(2).shuffle(pieces)
    return pieces


def make(directory: Path, num_megabytes: float) -> list[Path]:
    """Writes both files and returns them."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(3)
    pieces = paragraphs(num_megabytes * 5e5)

    def text(num_pieces: int) -> str:
        return "\n\n".join(draw.choice(pieces) for _ in range(num_pieces))

    def ask() -> str:
        question = draw.choice(ASKS).format(draw.randrange(2, 200))
        return question if draw.random() < 0.6 else f"{question}\n\n{text(1)}"

    def turns() -> Iterator[dict[str, str]]:
        if draw.random() < 0.5:
            yield {"role": "system", "content": "You are a helpful assistant."}
        for _ in range(draw.randrange(1, 5)):
            yield {"role": "user", "content": ask()}
            yield {"role": "assistant", "content": text(draw.randrange(1, 5))}

    def alpaca() -> dict[str, object]:
        given = text(1) if draw.random() < 0.4 else ""
        return {"instruction": ask(), "input": given, "output": text(draw.randrange(1, 5))}

    paths = []
    for name, record in (("alpaca", alpaca), ("messages", lambda: {"messages": list(turns())})):
        paths.append(directory / f"{name}.jsonl")
        num_bytes = 0
        with paths[-1].open("w", encoding="utf-8") as file:
            while num_bytes < num_megabytes * 1e6:
                num_bytes += file.write(json.dumps(record(), ensure_ascii=draw.random() < 0.2) + "\n")
    return paths


def make_chinese(files: list[Path], output: Path, max_bytes: float) -> bool:
    """Writes the records of `files` that are mostly Chinese; false if there is less than a megabyte of them."""
    num_bytes = 0
    with output.open("w", encoding="utf-8") as file:
        for path in files:
            for line in path.open(encoding="utf-8"):
                record = json.loads(line)
                said = [m["content"] or "" for m in record["messages"]] if "messages" in record else [*record.values()]
                if 3 * len(CHINESE.findall(" ".join(said))) > sum(map(len, said)):
                    num_bytes += file.write(json.dumps(record, ensure_ascii=False) + "\n")
                if num_bytes > max_bytes:
                    return True
    return output.stat().st_size > 1e6
