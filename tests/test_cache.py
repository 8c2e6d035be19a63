"""`sft-fast cache`: what is listed, what goes, and that nothing goes that a process makes or uses."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast import _core, lease
from sft_fast.cache import CacheContent, list_cache, parse_duration, parse_size, prune_cache
from sft_fast.errors import ConfigError, FileError
from tests.data_helpers import contents, dump_lines, random_records, write_dataset

DAY = 86400.0
OPTIONS: dict[str, Any] = {"system_key": "system", "query_key": "input"}


@pytest.fixture
def input_file(tmp_path: Path) -> Path:
    """A file with a few good records."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(random_records(20)))
    return path


@pytest.fixture
def cache(input_file: Path, tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A cache of three datasets that nobody uses, last used 3, 2 and 1 days ago."""
    directory = tmp_path / "cache"
    lengths = (512, 768, 1024)
    code = (
        "import sys, sft_fast\n"
        f"for length in {lengths}:\n"
        "    report = sft_fast.ensure_dataset(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], sequence_length=length, "
        f"**{OPTIONS})\n"
        "    print(report.path)"
    )
    command = [sys.executable, "-c", code, str(input_file), str(directory), str(tokenizer_dir)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for age, path in zip((3, 2, 1), output.split(), strict=True):
        at = time.time() - age * DAY - 60
        os.utime(Path(path) / "manifest.json", (at, at))
    return directory


def names(content: CacheContent) -> list[str]:
    """The names of the datasets, in order."""
    return [Path(dataset.path).name for dataset in content.datasets]


def test_the_list_tells_what_is_there(cache: Path, input_file: Path, tokenizer_dir: Path) -> None:
    """Every dataset is listed by last use, with the numbers of its manifest and its real size; nothing is touched."""
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    content = list_cache(cache)

    assert [dataset.sequence_length for dataset in content.datasets] == [512, 768, 1024]
    for dataset in content.datasets:
        opened = sft_fast.Dataset(dataset.path)
        assert (dataset.state, dataset.problem, dataset.is_in_use, dataset.is_ours) == ("whole", None, False, True)
        assert (dataset.fingerprint, dataset.num_samples) == (opened.fingerprint, len(opened))
        assert dataset.num_tokens == opened.lengths.sum()
        assert (dataset.tokenizer, dataset.template) == (str(tokenizer_dir), "native")
        assert dataset.files == (str(input_file),)
        assert dataset.num_bytes == sum(file.stat().st_size for file in Path(dataset.path).iterdir())
        assert dataset.used < time.time() - DAY < dataset.made
    assert content.num_bytes == sum(dataset.num_bytes for dataset in content.datasets)
    assert content.leftovers == ()
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_a_run_that_finds_a_dataset_uses_it(cache: Path, input_file: Path, tokenizer_dir: Path) -> None:
    """Finding a dataset in the cache makes it the last used, and in use until the process ends."""
    oldest = list_cache(cache).datasets[0]

    assert sft_fast.ensure_dataset(input_file, cache, tokenizer=tokenizer_dir, sequence_length=512, **OPTIONS).reused

    found = list_cache(cache).datasets[-1]
    assert found.path == oldest.path
    assert found.used >= time.time() - 60
    assert found.is_in_use


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [0, 1, 2]),
        ({"older_than_seconds": 2 * DAY}, [2]),
        ({"older_than_seconds": 3.5 * DAY}, [0, 1, 2]),
        ({"older_than_seconds": 0}, []),
        ({"max_bytes": 10**9}, [0, 1, 2]),
        ({"max_bytes": -1}, [1, 2]),
        ({"max_bytes": 0}, []),
        ({"older_than_seconds": 2.5 * DAY, "max_bytes": 10**9}, [1, 2]),
        ({"all_datasets": True}, []),
    ],
)
def test_prune_frees_what_it_is_told(cache: Path, limits: dict[str, Any], kept: list[int]) -> None:
    """By age, down to a size (the least recently used first) or all; a dry run says the same and removes nothing."""
    before = list_cache(cache)
    if limits.get("max_bytes") == -1:  # what the two newest take, exactly
        limits = {"max_bytes": sum(dataset.num_bytes for dataset in before.datasets[1:])}

    planned = prune_cache(cache, dry_run=True, **limits)
    assert list_cache(cache) == before
    report = prune_cache(cache, **limits)

    assert (planned.is_dry_run, report.is_dry_run) == (True, False)
    assert planned.datasets == report.datasets
    assert names(list_cache(cache)) == [names(before)[number] for number in kept]
    assert report.num_freed_bytes == before.num_bytes - report.num_kept_bytes
    assert report.num_kept_bytes == list_cache(cache).num_bytes
    assert len(list(cache.iterdir())) == len(kept)


def damage_shard(dataset: Path) -> None:
    """Cuts the end off a shard."""
    shard = dataset / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        damage_shard,
        lambda dataset: (dataset / "manifest.json").unlink(),
        lambda dataset: (dataset / "manifest.json").write_text("{"),
        lambda dataset: (dataset / "manifest.json").write_text("[" * 100_000),
        lambda dataset: (dataset / "shard-00000.safetensors").unlink(),
        lambda dataset: [file.unlink() for file in dataset.iterdir()],
        lambda dataset: dataset.rename(dataset.with_name("0" * 32)),
    ],
    ids=["short shard", "no manifest", "broken manifest", "deep manifest", "no shard", "empty", "wrong name"],
)
def test_a_damaged_dataset_is_told_and_removed(cache: Path, damage: Callable[[Path], object]) -> None:
    """What can't be opened, or stands under a wrong name, is listed as damaged with the reason, and always goes."""
    whole = list_cache(cache).datasets
    damage(Path(whole[1].path))

    damaged = [dataset for dataset in list_cache(cache).datasets if dataset.state == "damaged"]
    report = prune_cache(cache)

    assert len(damaged) == 1
    assert damaged[0].problem
    assert [dataset.path for dataset in report.datasets] == [damaged[0].path]
    assert list_cache(cache).datasets == (whole[0], whole[2])
    assert len(list(cache.iterdir())) == 2


def test_a_dataset_of_another_version_is_not_damaged(cache: Path) -> None:
    """A format version that we don't read is told, and goes only as a whole dataset would."""
    path = Path(list_cache(cache).datasets[0].path) / "manifest.json"
    path.write_text(path.read_text().replace(f'"format_version": {_core.FORMAT_VERSION}', '"format_version": 99'))

    other = next(dataset for dataset in list_cache(cache).datasets if dataset.state != "whole")

    assert other.state == "other version"
    assert prune_cache(cache).datasets == ()
    assert other in prune_cache(cache, all_datasets=True).datasets


def test_litter_of_killed_runs_is_told_and_removed(cache: Path) -> None:
    """Temporary directories and lock files of dead processes are listed and go; those of a living one stay."""
    dead, alive = "a" * 32, "b" * 32
    for name in (dead, alive):
        (cache / f".{name}.tmp-123").mkdir()
        (cache / f".{name}.tmp-123" / "shard-00000.safetensors").write_text("half")
        (cache / f".{name}.lock").touch()
    (cache / f".{'c' * 32}.tmp-5").mkdir()
    with (cache / f".{alive}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {Path(leftover.path).name: leftover for leftover in list_cache(cache).leftovers}
        report = prune_cache(cache)

        assert {name: leftover.is_alive for name, leftover in found.items()} == {
            f".{dead}.tmp-123": False, f".{dead}.lock": False, f".{'c' * 32}.tmp-5": False,
            f".{alive}.tmp-123": True, f".{alive}.lock": True,
        }  # fmt: skip
        assert found[f".{dead}.tmp-123"].num_bytes == report.num_freed_bytes == 4
        assert {Path(leftover.path).name for leftover in report.leftovers} == {
            name for name, leftover in found.items() if not leftover.is_alive
        }
        assert sorted(path.name for path in cache.iterdir() if path.name.startswith(".")) == [
            f".{alive}.lock", f".{alive}.tmp-123",
        ]  # fmt: skip

    assert len(prune_cache(cache).leftovers) == 2
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_what_is_not_the_cache_is_never_touched(cache: Path, tmp_path: Path) -> None:
    """Datasets under names of the user's, with files of his, or behind links, and whatever else is there, all stay."""
    with_notes, _, moved = (Path(dataset.path) for dataset in list_cache(cache).datasets)
    (with_notes / "notes.txt").write_text("mine")
    elsewhere = Path(shutil.move(moved, tmp_path / "elsewhere"))
    (cache / ("d" * 32)).symlink_to(elsewhere)
    named = write_dataset(cache / "mine", [([1, 2], [False, True])])
    (cache / ".mine.lock").touch()
    (cache / ".mine.tmp-1").mkdir()
    (cache / "directory").mkdir()
    (cache / "directory" / "manifest.json").write_text('{"name": "a browser extension"}')
    (cache / "file").write_text("mine")
    (cache / f".{'e' * 32}.lock").symlink_to(cache / "file")
    for path in (named, with_notes, elsewhere):
        os.utime(path / "manifest.json", (0, 0))
    before = contents(tmp_path)

    listed = {Path(dataset.path).name: dataset.is_ours for dataset in list_cache(cache).datasets}
    report = prune_cache(cache, all_datasets=True, older_than_seconds=0, max_bytes=0)

    assert listed[named.name] is listed[with_notes.name] is listed["d" * 32] is False
    gone = {f"cache/{Path(dataset.path).name}" for dataset in report.datasets}
    assert len(gone) == sum(listed.values()) == 1
    assert contents(tmp_path) == {
        name: content for name, content in before.items() if not any(name.startswith(path) for path in gone)
    }


def hold(code: str, *arguments: Any) -> "subprocess.Popen[str]":
    """A process that runs `code` and has printed its first line."""
    command = [sys.executable, "-u", "-c", f"import sys, time, sft_fast\n{code}", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: "subprocess.Popen[str]") -> None:
    """Kills the process."""
    assert process.stdout is not None
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_dataset_in_use_stays(cache: Path) -> None:
    """What another process has open is told and stays, whatever is asked, until that process is dead."""
    path = list_cache(cache).datasets[0].path
    process = hold("dataset = sft_fast.Dataset(sys.argv[1]); print(); time.sleep(100)", path)
    try:
        assert [dataset.is_in_use for dataset in list_cache(cache).datasets] == [True, False, False]
        report = prune_cache(cache, all_datasets=True)
        assert [dataset.path for dataset in report.kept_in_use] == [path]
        assert [dataset.path for dataset in list_cache(cache).datasets] == [path]
    finally:
        end(process)

    assert [dataset.path for dataset in prune_cache(cache, all_datasets=True).datasets] == [path]
    assert list(cache.iterdir()) == []


def test_a_dataset_is_in_use_as_long_as_it_is_open(cache: Path) -> None:
    """The lock of a Dataset ends with the object, and with it the claim on the files."""
    path = list_cache(cache).datasets[0].path
    dataset = sft_fast.Dataset(path)
    views = [dataset.pack(sequence_length=1024), sft_fast.Dataset(path)]
    del dataset
    assert list_cache(cache).datasets[0].is_in_use
    views.pop()
    assert list_cache(cache).datasets[0].is_in_use
    views.clear()

    assert not list_cache(cache).datasets[0].is_in_use


def test_pruning_beside_runs_breaks_nothing(input_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """While one process prunes everything without a pause, others make and read the same datasets as if alone."""
    cache = tmp_path / "cache"
    cache.mkdir()
    pruner = hold(
        "from sft_fast.cache import prune_cache\nprint(flush=True)\n"
        "while True: prune_cache(sys.argv[1], all_datasets=True)",
        cache,
    )
    # One dataset open at a time, and none kept to the end of the process: there is always something to prune.
    code = (
        "from sft_fast import lease\nprint(flush=True)\nmade = 0\n"
        "for turn in range(40):\n"
        "    report = sft_fast.ensure_dataset(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], "
        f"sequence_length=1000 + turn % 3, **{OPTIONS})\n"
        "    dataset = sft_fast.Dataset(report.path)\n"
        "    assert len(dataset) == 20\n"
        "    sft_fast.verify(report.path)\n"
        "    made += not report.reused\n"
        "    del dataset\n"
        "    lease._kept.clear()\n"
        "print(made)"
    )
    try:
        workers = [hold(code, input_file, cache, tokenizer_dir) for _ in range(2)]
        counts = []
        for worker in workers:
            assert worker.stdout is not None
            counts.append(int(worker.stdout.read()))
            assert worker.wait() == 0
            worker.stdout.close()
        assert pruner.poll() is None
    finally:
        end(pruner)

    assert sum(counts) > 10
    prune_cache(cache, all_datasets=True)
    assert list(cache.iterdir()) == []


def test_a_killed_prune_leaves_no_half_dataset(input_file: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Killed with its work half done, a prune leaves whole datasets and litter, and the litter goes with the next."""
    cache = tmp_path / "cache"
    path = Path(
        sft_fast.ensure_dataset(input_file, cache, tokenizer=tokenizer_dir, sequence_length=512, **OPTIONS).path
    )
    lease._kept.clear()
    code = (
        "import os, shutil, signal\nfrom sft_fast.cache import prune_cache\n"
        "def remove(path):\n"
        "    os.unlink(os.path.join(path, 'manifest.json'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = remove\nprint(flush=True)\nprune_cache(sys.argv[1], all_datasets=True)"
    )
    process = hold(code, cache)
    assert process.wait() == -signal.SIGKILL
    end(process)

    assert list_cache(cache).datasets == ()
    assert sorted(Path(leftover.path).name for leftover in list_cache(cache).leftovers) == [
        f".{path.name}.lock",
        f".{path.name}.tmp-{process.pid}",
    ]
    assert prune_cache(cache).num_freed_bytes > 0
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_duration, "30d", 30 * DAY), (parse_duration, "12h", DAY / 2), (parse_duration, "1.5m", 90),
        (parse_duration, "0s", 0), (parse_duration, "2 W", 14 * DAY),
        (parse_size, "50GB", 50 * 10**9), (parse_size, "1.5tb", 15 * 10**11), (parse_size, "12", 12),
        (parse_size, "2GiB", 2 << 30), (parse_size, "7 b", 7),
    ],
)  # fmt: skip
def test_times_and_sizes(parse: Callable[[str], float], text: str, value: float) -> None:
    """Numbers with a unit are read, whatever the case."""
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_duration, text) for text in ("30", "d", "-1d", "1e3d", "1 month", "", "٣d")),
        *((parse_size, text) for text in ("50XB", "GB", "-5", "1,000", "", "nan")),
    ],
)
def test_other_times_and_sizes_are_refused(parse: Callable[[str], float], text: str) -> None:
    """Anything else is a ConfigError that shows the form."""
    with pytest.raises(ConfigError, match="such as"):
        parse(text)


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    """A cache that isn't there is named."""
    for function in (list_cache, prune_cache):
        with pytest.raises(FileError, match="No such file") as caught:
            function(tmp_path / "nowhere")
        assert caught.value.path == str(tmp_path / "nowhere")


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_the_commands(run_cli: Run, cache: Path, tmp_path: Path) -> None:
    """The commands print what the functions return, for a directory given or the usual one."""
    oldest = names(list_cache(cache))[0]

    listed = json.loads(run_cli("cache", "list", cache, "--json").stdout)
    assert [Path(dataset["path"]).name for dataset in listed["datasets"]] == names(list_cache(cache))
    text = run_cli("cache", "list", "cache").stdout
    assert all(name in text for name in names(list_cache(cache)))
    assert "cache: 3 data sets, " in text

    planned = run_cli("cache", "prune", "cache", "--older-than", "60h", "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "")
    assert planned.stdout.startswith(oldest)
    assert "would be freed" in planned.stdout
    pruned = run_cli("cache", "prune", "cache", "--older-than=60h", "--json")
    assert [Path(dataset["path"]).name for dataset in json.loads(pruned.stdout)["datasets"]] == [oldest]
    assert "cache: 2 data sets" in run_cli("cache", "list", "cache").stdout

    for arguments, message in (
        (("cache", "list", "one", "two"), "expected one directory"),
        (("cache", "list"), "output/data"),
        (("cache", "prune", "cache", "--max-bytes", "lots"), "such as 500MB"),
    ):
        result = run_cli(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr


def test_the_cache_of_a_configuration(run_cli: Run, cache: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """With --config-name the cache is that of the configuration."""
    config = {
        "pretrain": str(tokenizer_dir),
        "sequence_length": 512,
        "data_cache_dir": "cache",
        "num_gpus_per_node": 0,
        "sft_train": {"data_args": {"file_name": "data.jsonl"}, "device_mapping": [0]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))

    result = run_cli("cache", "prune", "--config-name", "run", "--max-bytes", "0", "--json")

    assert len(json.loads(result.stdout)["datasets"]) == 3
    assert list(cache.iterdir()) == []
