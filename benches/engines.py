"""The tokenizer engines that exist beside ours, each in fresh processes: `benches/engines.py MODEL FILE.jsonl...`.

Every string of the records is one text, in chat markup. Ids are compared with those of `tokenizers` on all texts, and
counted where they differ. Speed is bytes of text by CPU seconds of one thread, cold (the first pass of a process) and
warm (the second), on all texts and on the English, the code and the Chinese among them. The wheels live in an
environment of their own (`build/bench/engines`), which the first run makes; ours and the `tokenizers` crate are
`benches/engine.rs`.
"""

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
# Wheels; docs/benchmarks.md says why others are not here.
PACKAGES = "numpy tokenizers==0.23.3 snaptokens==0.2.6 fastokens==0.3.5 gigatoken==0.10.0 splintr-rs==0.22.0"
PACKAGES += " tiktoken==0.14.0 tokie==0.1.4 kitoken==0.11.1"
NATIVE = ("sft-fast", "tokenizers")
WHEELS = ("tokenizers wheel", "tiktoken", "kitoken", "tokie", "splintr", "fastokens", "gigatoken", "snaptokens")
SETS = ("mixed", "English", "code", "Chinese")
# Enough to show the speed of an engine that has no cache worth filling.
SLOW = {"tokenizers": 5e6, "tokenizers wheel": 5e6, "kitoken": 10e6, "tiktoken": 10e6}

Encoded = tuple[Any, Any]


def strings(value: Any) -> Iterator[str]:
    """All strings of a record, from the top."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from strings(item)


def texts_of(files: Iterable[Path], max_bytes: float) -> dict[str, list[str]]:
    """The sets of texts."""
    chinese = re.compile("[\u4e00-\u9fff]")
    files = list(files)
    sets: dict[str, list[str]] = {name: [] for name in SETS}
    for file in files:
        num_bytes = 0
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                for text in strings(json.loads(line)):
                    if len(text) < 12:
                        continue
                    sets["mixed"].append(f"<|im_start|>user\n{text}<|im_end|>\n")
                    num_bytes += len(sets["mixed"][-1].encode())
                    parts = text.split("```")
                    sets["code"] += parts[1::2]
                    for prose in parts[::2]:
                        if len(prose) > 40 and prose.isascii():
                            sets["English"].append(prose)
                        elif len(chinese.findall(prose)) * 3 > len(prose):
                            sets["Chinese"].append(prose)
                if num_bytes > max_bytes / len(files):
                    break
    return sets


def write_texts(texts: list[str], path: Path, max_bytes: float = 1e12) -> None:
    """Writes texts as `benches/engine.rs` and `child` read them."""
    num_bytes = 0
    with path.open("wb") as file:
        for text in texts:
            encoded = text.encode()
            num_bytes += len(encoded)
            if num_bytes > max_bytes:
                break
            file.write(struct.pack("<I", len(encoded)) + encoded)


def read_parts(path: Path, size: int) -> list[bytes]:
    """Parts, each behind its length in units of `size` bytes."""
    content = path.read_bytes()
    parts, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        parts.append(content[at + 4 : at + 4 + size * length])
        at += 4 + size * length
    return parts


def flat(rows: list[Any]) -> Encoded:
    """Ids of all texts, one after the other, and how many each has."""
    import numpy as np

    return np.concatenate([np.asarray(row, np.uint32) for row in rows]), np.array([len(row) for row in rows])


def load_wheel(name: str, model: Path) -> tuple[Callable[[list[str]], Any], Callable[[Any], Encoded]]:
    """An engine that encodes many texts, and how to read what it returns; only the first is timed."""
    import numpy as np

    path = str(model / "tokenizer.json")
    if name == "tokenizers wheel":
        import tokenizers

        tokenizer: Any = tokenizers.Tokenizer.from_file(path)
        encode = lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # noqa: E731
        return encode, lambda rows: flat([row.ids for row in rows])
    if name in ("snaptokens", "fastokens"):
        module: Any = __import__(name)
        tokenizer = module.Tokenizer.from_file(path)

        def packed(result: Any) -> Encoded:
            ids, offsets = (bytes(part) for part in result)
            return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

        return tokenizer.encode_batch_flat, packed
    if name == "gigatoken":
        import awkward
        import gigatoken

        tokenizer = gigatoken.Tokenizer.from_json(Path(path).read_bytes())
        read = lambda rows: (awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows)))  # noqa: E731
        return lambda texts: tokenizer.encode_batch(texts, parallel=False), read
    if name == "splintr":
        import splintr

        tokenizer = splintr.from_json(path)

        def rows(result: Any) -> Encoded:
            ids, offsets = (
                np.frombuffer(part, kind) for part, kind in zip(result, (np.uint32, np.uint64), strict=True)
            )
            return ids, np.diff(offsets.astype(np.int64))

        return tokenizer.encode_batch_flat, rows
    if name == "tokie":
        import tokie

        tokenizer = tokie.Tokenizer.from_json(path)
        return lambda texts: tokenizer.encode_batch_flat(texts, add_special_tokens=False), lambda result: result
    if name == "kitoken":
        import kitoken

        tokenizer = kitoken.Kitoken.from_tokenizers_file(path)
        return lambda texts: tokenizer.encode_all(texts, True), flat
    if name == "tiktoken":
        import tiktoken

        return tiktoken_encode(tiktoken, json.loads(Path(path).read_bytes()))
    raise ValueError(name)


def tiktoken_encode(tiktoken: Any, tokenizer: Any) -> Any:
    """Tiktoken with the vocabulary and the expression of a tokenizer.json."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + number): byte for number, byte in enumerate(others)}
    ranks = {bytes(letters[letter] for letter in token): id for token, id in tokenizer["model"]["vocab"].items()}
    pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    encoding = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda texts: [encoding.encode_to_numpy(text, allowed_special="all") for text in texts], flat


def peak_bytes() -> int:
    """The most memory that this process had; `ru_maxrss` also counts what its parent had when it started this one."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


def child(name: str, model: str, texts_path: str, ids_path: str) -> None:
    """Measures one wheel in this process; prints what `benches/engine.rs` prints."""
    import numpy as np

    texts = [part.decode() for part in read_parts(Path(texts_path), 1)]
    peak_before = peak_bytes()
    start = time.process_time()
    encode, read = load_wheel(name, Path(model))
    encode(["a"])
    seconds = [time.process_time() - start]
    for _ in range(2):
        start = time.process_time()
        result = encode(texts)
        seconds.append(time.process_time() - start)
    peak = peak_bytes()
    measured = dict(zip(("load", "cold", "warm"), seconds, strict=True))
    num_bytes = sum(len(text.encode()) for text in texts)
    print(json.dumps({**measured, "num_bytes": num_bytes, "peak": peak, "peak_before": peak_before}))
    ids, counts = read(result)
    with Path(ids_path).open("wb") as file:
        at = 0
        for count in map(int, counts):
            file.write(struct.pack("<I", count) + np.ascontiguousarray(ids[at : at + count], np.uint32).tobytes())
            at += count


def environment() -> Path:
    """The interpreter that has the wheels."""
    python = BUILD / "engines" / "bin" / "python"
    done = BUILD / "engines" / "packages.txt"
    if not done.is_file() or done.read_text() != PACKAGES:
        uv = Path(sys.executable).parent / "uv"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, BUILD / "engines"], check=True)
        install = [uv, "pip", "install", "--quiet", "--only-binary", ":all:", "--python", python]
        subprocess.run([*install, *PACKAGES.split()], check=True)
        done.write_text(PACKAGES)
    return python


def native() -> Path:
    """The built `benches/engine.rs`."""
    command = "cargo bench --locked --quiet -p sft-fast-core --bench engine --no-run --message-format json".split()
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    return next(Path(m["executable"]) for m in messages if m.get("executable") and m["target"]["name"] == "engine")


def measure(name: str, model: Path, texts: Path, ids: Path) -> dict[str, float] | str:
    """One engine on one file of texts, in a fresh process; what went wrong, if it did."""
    if name in NATIVE:
        command = [native(), name, model, texts, ids]
    else:
        command = [environment(), __file__, "--child", name, model, texts, ids]
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | one_thread, timeout=180)
    except subprocess.TimeoutExpired:
        return "takes more than three minutes"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ends with {done.returncode}"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(model: Path, files: list[Path], num_runs: int = 2, max_bytes: float = 40e6) -> list[str]:
    """The table as lines of Markdown."""
    work = BUILD / "texts"
    work.mkdir(parents=True, exist_ok=True)
    sets = texts_of(files, max_bytes)
    write_texts(sets["mixed"], work / "all")
    reference = measure("tokenizers", model, work / "all", work / "expected")
    assert not isinstance(reference, str), reference
    expected = read_parts(work / "expected", 4)
    sizes = ", ".join(f"{name} {sum(len(t.encode()) for t in texts) / 1e6:.0f} MB" for name, texts in sets.items())
    lines = [
        f"{len(expected):,} texts; {sizes}. MB/cpu-s, cold / warm, best of {num_runs}.",
        "",
        f"| engine | other ids | {' | '.join(SETS)} | load, s | memory, MB |",
        f"|---|---|{'---|' * (len(SETS) + 2)}",
    ]
    for name in [*WHEELS, *NATIVE]:
        print(f"{name} …", file=sys.stderr)
        checked = measure(name, model, work / "all", work / "ids")
        if isinstance(checked, str):
            lines.append(f"| {name} | left out: {checked} |{' |' * (len(SETS) + 2)}")
            continue
        found = read_parts(work / "ids", 4)
        num_other = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
        cells = []
        for number, set_name in enumerate(SETS):
            write_texts(sets[set_name], work / "set", SLOW.get(name, 1e12))
            runs = [measure(name, model, work / "set", work / "ids") for _ in range(num_runs)]
            good = [run for run in runs if not isinstance(run, str)]
            if not good:
                cells.append(str(runs[0]))
                continue
            cells.append(" / ".join(f"{max(r['num_bytes'] / 1e6 / r[p] for r in good):.1f}" for p in ("cold", "warm")))
            if number == 0:
                load = min(run["load"] for run in good)
        memory = (checked["peak"] - checked["peak_before"]) / 1e6
        lines.append(f"| {name} | {num_other} | {' | '.join(cells)} | {load:.2f} | {memory:.0f} |")
    return lines


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        print("\n".join(compare(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])))
