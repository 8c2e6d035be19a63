"""Preprocessing that is killed, interrupted, or refused by the system: the old state or the new, and a clear error."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast import lease
from sft_fast.cache import list_cache, prune_cache
from tests.data_helpers import contents, dump_lines, random_records

OPTIONS: dict[str, Any] = {"sequence_length": 1024, "system_key": "system", "query_key": "input"}

# A process that preprocesses: arguments are tokenizer, output directory, size of a shard, and files.
CHILD = f"""
import sys, sft_fast
from functools import partial
from sft_fast import data
from sft_fast.errors import SftFastError
def run(tokenizer, out, max_shard_tokens, *files, **changes):
    private = partial(core, max_shard_tokens=int(max_shard_tokens))
    data._core.preprocess = private
    return sft_fast.preprocess(files, out, tokenizer=tokenizer, **{{**{OPTIONS!r}, **changes}})
core = data._core.preprocess
"""


def start(code: str, *arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    """A process that runs `code` behind CHILD; it is ready when it has printed its first line."""
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: "subprocess.Popen[str]") -> str:
    """What the process printed after its first line; it must have ended well."""
    assert process.stdout is not None
    output = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0
    return output


def kill(process: "subprocess.Popen[str]") -> None:
    """Ends the process without asking it."""
    assert process.stdout is not None
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a good while."""
    path = tmp_path_factory.mktemp("large") / "data.jsonl"
    path.write_bytes(dump_lines(random_records(2000, max_words=60)) * 15)
    return path


def test_killed_while_replacing(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Killed at random moments of replacing a dataset, the old one or the new one is whole; the next run cleans up."""
    small = tmp_path / "small.jsonl"
    small.write_bytes(dump_lines(random_records(3)))
    out = tmp_path / "here" / "out"
    old = sft_fast.preprocess(small, out, tokenizer=tokenizer_dir, **OPTIONS).fingerprint
    code = "print('ready', flush=True); print(run(*sys.argv[1:], overwrite=True).fingerprint)"
    arguments = (tokenizer_dir, out, 200_000, large_file)
    began = time.monotonic()
    new = finish(start(code, *arguments)).strip()
    seconds = time.monotonic() - began

    delays = random.Random(3)
    for _ in range(5):
        sft_fast.preprocess(small, out, tokenizer=tokenizer_dir, overwrite=True, **OPTIONS)
        process = start(code, *arguments)
        time.sleep(delays.uniform(0, seconds))
        kill(process)
        sft_fast.verify(out)
        assert sft_fast.Dataset(out).fingerprint in (old, new)

    assert finish(start(code, *arguments)).strip() == new
    sft_fast.verify(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_dead_process_blocks_no_one(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A process that waits for another goes on when that one is killed, and does its work."""
    arguments = (tokenizer_dir, tmp_path / "out", 200_000, large_file)
    first = start("print('ready', flush=True); run(*sys.argv[1:])", *arguments)
    while not list(tmp_path.glob(".out.tmp-*")):
        time.sleep(0.001)
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    # Ready as soon as it waits for the lock: there is nothing else to tell of when the input is hashed.
    tell = "lambda state: state.is_hashing or print('ready', flush=True)"
    second = start(f"print('\\n', run(*sys.argv[1:], progress={tell}).reused)", *arguments)
    kill(first)

    assert finish(second).split()[-1] == "False"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_stops_the_work(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work is KeyboardInterrupt, and nothing is left."""

    def interrupt() -> None:
        while not list(tmp_path.glob(".out.tmp-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()

    # On one thread the file, taken many times over, takes far longer than the signal.
    with pytest.raises(KeyboardInterrupt):
        sft_fast.preprocess([large_file] * 20, tmp_path / "out", tokenizer=tokenizer_dir, num_threads=1, **OPTIONS)
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_command(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C at random moments of the work ends the command with 130 and one last line, and nothing is left."""
    options = ["--output-dir", tmp_path / "here" / "out", "--tokenizer", tokenizer_dir, "--sequence-length", 1024]
    # On one thread the file, taken many times over, takes far longer than the signal.
    arguments = ["preprocess", *[large_file] * 20, *options, "--num-threads", 1]
    code = "import sys, sft_fast; from sft_fast.cli import main; print('ready', flush=True); main(sys.argv[1:])"
    delays = random.Random(8)
    for _ in range(6):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delays.uniform(0.1, 1.0))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()

        # The shapes of the records may have been said before.
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted; nothing half-done is left"
        assert list(tmp_path.iterdir()) == []


def test_killed_beside_others_in_a_cache(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Of three processes that want a dataset of a cache, whichever is killed when, the others get it, made once."""
    cache = tmp_path / "cache"
    code = (
        f"tokenizer, cache, file = sys.argv[1:]\nprint('ready', flush=True)\n"
        f"report = sft_fast.ensure_dataset(file, cache, tokenizer=tokenizer, **{OPTIONS!r})\n"
        "sft_fast.verify(report.path)\nprint(report.path, report.reused)"
    )
    choose = random.Random(6)
    for _ in range(5):
        processes = [start(code, tokenizer_dir, cache, large_file) for _ in range(3)]
        time.sleep(choose.uniform(0, 0.6))
        killed = processes.pop(choose.randrange(3))
        kill(killed)
        lines = [finish(process).split() for process in processes]

        assert len({path for path, _ in lines}) == 1
        # Nobody made it if the killed one was done with it; never did two.
        assert [reused for _, reused in lines].count("False") <= 1
        [dataset] = list_cache(cache).datasets
        assert (dataset.state, dataset.is_in_use) == ("whole", False)
        assert [leftover.is_alive for leftover in list_cache(cache).leftovers if leftover.is_alive] == []
        prune_cache(cache, all_datasets=True)
        assert list(cache.iterdir()) == []


def test_every_worker_killed_leaves_litter_only(large_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Killed at random moments, what is in the cache is a whole dataset or litter that is known and goes."""
    cache = tmp_path / "cache"
    cache.mkdir()
    code = (
        "tokenizer, cache, file = sys.argv[1:]\nprint('ready', flush=True)\n"
        f"sft_fast.ensure_dataset(file, cache, tokenizer=tokenizer, **{OPTIONS!r})"
    )
    choose = random.Random(7)
    num_leftovers = 0
    for _ in range(12):
        process = start(code, tokenizer_dir, cache, large_file)
        time.sleep(choose.uniform(0, 0.6))
        kill(process)
        content = list_cache(cache)
        assert all(dataset.state == "whole" for dataset in content.datasets)
        for dataset in content.datasets:
            sft_fast.verify(dataset.path)
        known = {part.path for part in (*content.datasets, *content.leftovers)}
        assert known == {str(path) for path in cache.iterdir()}
        num_leftovers += len(content.leftovers)
        report = prune_cache(cache)
        assert len(report.leftovers) == len(content.leftovers)
        assert [str(path) for path in cache.iterdir()] == [dataset.path for dataset in content.datasets]
        prune_cache(cache, all_datasets=choose.random() < 0.5)

    assert num_leftovers > 2


def test_a_full_disk_is_one_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Wherever the disk becomes full, the error is a FileError that says so, and nothing is left."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines([*random_records(300), *["{"] * 300]))
    code = """
import errno, os, resource
print('ready', flush=True)
for limit in (0, 100, 1000, 2000, 4000, 8000, 16_000, 30_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        result = str(run(*sys.argv[1:], on_error="skip").num_samples)
    except sft_fast.FileError as error:
        result = f"{error.code}: {error.message}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(result, os.listdir(os.path.dirname(sys.argv[4])), sep="\\t")
"""
    lines = finish(start(code, tokenizer_dir, tmp_path / "out", 2000, path)).splitlines()

    results = [line.split("\t") for line in lines]
    assert len(results) == 9
    for result, left in results[:-1]:
        assert result.startswith("file: could not write: ")
        assert "too large" in result
        assert left == "['data.jsonl']"
    assert results[-1][0] == "300"


def test_no_more_file_handles_is_one_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    """However few files a process may open, the work is done or ends in an error of ours, and nothing is left."""
    for number in range(80):
        (tmp_path / f"{number}.jsonl").write_bytes(dump_lines(random_records(3)))
    out = tmp_path / "here" / "out"
    code = """
import os, resource, shutil
print('ready', flush=True)
run(sys.argv[1], sys.argv[2] + '.first', *sys.argv[3:])  # whatever opens files once, such as a look at the cores
shutil.rmtree(os.path.dirname(sys.argv[2]))
first = max(map(int, os.listdir('/proc/self/fd')))
for spare in range(25):
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        result = str(run(*sys.argv[1:]).num_samples)
    except SftFastError as error:
        result = type(error).__name__ + ' ' + error.message
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print(result, os.path.exists(os.path.dirname(sys.argv[2])), sep='\\t')
    shutil.rmtree(os.path.dirname(sys.argv[2]), ignore_errors=True)
"""
    lines = finish(start(code, tokenizer_dir, out, 2000, *tmp_path.glob("*.jsonl"))).splitlines()

    results = [line.split("\t") for line in lines]
    assert len(results) == 25
    for result, is_left in results:
        assert (result, is_left) == ("240", "True") or ("Too many open files" in result and is_left == "False")
    assert results[-1][0] == "240"
    assert results[0][0].startswith("FileError could not")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_read_only_place_is_one_error(tokenizer_dir: Path, open_directory: Path) -> None:
    """Where nothing may be written, making a dataset is a FileError, and one that is there is used."""
    path = open_directory / "data.jsonl"
    path.write_bytes(dump_lines(random_records(5)))
    sft_fast.preprocess(path, open_directory / "made", tokenizer=tokenizer_dir, **OPTIONS)
    model = open_directory / "model"
    model.mkdir()
    for file in tokenizer_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    before = contents(open_directory)
    open_directory.chmod(0o555)
    # Root may write everywhere: as root, the process becomes nobody once it has loaded what it needs.
    code = """
import os
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
print('ready', flush=True)
tokenizer, made, shard, path = sys.argv[1:]
print(run(tokenizer, made, shard, path).reused)
for out in ('new', 'new/out', 'made/out'):
    try:
        run(tokenizer, os.path.join(os.path.dirname(made), out), shard, path)
    except sft_fast.FileError as error:
        print(error.exit_status, error.message)
"""
    lines = finish(start(code, model, open_directory / "made", 2000, path)).splitlines()
    open_directory.chmod(0o755)

    assert lines[0] == "True"
    assert len(lines) == 4
    assert all(line.startswith("2 could not make the ") and "ermission denied" in line for line in lines[1:])
    assert contents(open_directory) == before


def test_a_read_only_cache_is_used(tokenizer_dir: Path, open_directory: Path) -> None:
    """In a cache where nothing may be written, a dataset is found and used; pruning there is a FileError."""
    path = open_directory / "data.jsonl"
    path.write_bytes(dump_lines(random_records(5)))
    cache = open_directory / "cache"
    made = sft_fast.ensure_dataset(path, cache, tokenizer=tokenizer_dir, **OPTIONS)
    model = open_directory / "model"
    model.mkdir()
    for file in tokenizer_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    lease._kept.clear()
    before = contents(open_directory)
    for directory in (cache, Path(made.path), open_directory):
        directory.chmod(0o555)
    code = f"""
import os
from sft_fast.cache import list_cache, prune_cache
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
print('ready', flush=True)
tokenizer, cache, path = sys.argv[1:]
print(sft_fast.ensure_dataset(path, cache, tokenizer=tokenizer, **{OPTIONS!r}).reused)
print(list_cache(cache).datasets[0].state, list_cache(cache).datasets[0].is_in_use)
try:
    prune_cache(cache, all_datasets=True)
except sft_fast.FileError as error:
    print(error.message)
from sft_fast import lease
lease._kept.clear()
try:
    prune_cache(cache, all_datasets=True)
except sft_fast.FileError as error:
    print(error.message)
"""
    lines = finish(start(code, model, cache, path)).splitlines()
    for directory in (open_directory, cache, Path(made.path)):
        directory.chmod(0o755)

    assert lines[:2] == ["True", "whole True"]
    assert lines[2:] == ["could not remove: Permission denied"]
    assert contents(open_directory) == before


def test_a_dataset_opens_or_is_one_error_with_few_file_handles(tokenizer_dir: Path, tmp_path: Path) -> None:
    """However few files a process may open, a dataset opens whole or is a FileError that says why."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(random_records(50)))
    sft_fast.preprocess(path, tmp_path / "out", tokenizer=tokenizer_dir, **OPTIONS)
    code = """
import os, resource
print('ready', flush=True)
sft_fast.Dataset(sys.argv[1])
first = max(map(int, os.listdir('/proc/self/fd')))
for spare in range(6):
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        result = str(len(sft_fast.Dataset(sys.argv[1])))
    except sft_fast.FileError as error:
        result = error.message
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    print(result)
"""
    results = finish(start(code, tmp_path / "out")).splitlines()

    assert len(results) == 6
    assert all(result == "50" or "Too many open files" in result for result in results)
    assert (results[0] != "50", results[-1]) == (True, "50")
