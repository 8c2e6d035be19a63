"""Preprocessing by other processes and machines: the same bytes as of one, whoever is lost on the way."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import sft_fast
from sft_fast import distributed
from sft_fast._core import TaskRunner
from sft_fast.cache import list_cache, prune_cache
from sft_fast.errors import ClusterError
from tests.conftest import make_tokenizer_dir
from tests.data_helpers import contents, dump_lines, knobs, random_records

OPTIONS: dict[str, Any] = {"sequence_length": 128, "system_key": "system", "query_key": "input", "on_error": "skip"}
KNOBS: dict[str, int] = {"part_bytes": 60_000, "max_shard_tokens": 20_000}


class Executor:
    """Does tasks in this process, in any order; the methods are those of `RayExecutor`."""

    made: "list[Executor]" = []  # noqa: RUF012  # the last is that of the last call

    def __init__(self, address: str, num_threads: int | None = None) -> None:
        self.address, self.num_threads = address, num_threads
        self.directory, self.tasks, self.names = "", dict[int, tuple[str, str]](), list[str]()
        self.made.append(self)
        self.random = random.Random(len(self.made))

    def begin(self, directory: str, tokenizer: str, template: str, template_date: str) -> None:
        """Takes note of the arguments of all tasks."""
        self.directory, self.runner = str(directory), TaskRunner(tokenizer, template, template_date)

    def submit(self, number: int, name: str, task: str) -> None:
        """Takes a task."""
        self.tasks[number] = name, task

    def poll(self) -> tuple[list[tuple[int, str]], int]:
        """Does some of the tasks."""
        numbers = self.random.sample(sorted(self.tasks), min(len(self.tasks), 2))
        return [(number, self.run(*self.tasks.pop(number))) for number in numbers], max(0, 7 - len(self.tasks))

    def run(self, name: str, task: str) -> str:
        """Does a task."""
        self.names.append(name)
        return self.runner.run(task, self.directory, self.num_threads, "unique")

    def stop(self) -> None:
        """Gives up what was not begun."""
        self.tasks = {}

    close = stop


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Executor]], None]:
    """Lets `preprocess` with a `ray_address` use an executor of this process."""

    def use(kind: type[Executor]) -> None:
        monkeypatch.setattr("sft_fast.data.RayExecutor", kind)

    use(Executor)
    return use


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Inputs of every kind that is read otherwise, with wrong records, duplicates, and an empty file."""
    directory = tmp_path_factory.mktemp("input")
    records = random_records(900, seed=1, max_words=20)
    odd = ["{", {"instruction": "a", "output": ""}, "", {"instruction": "a " * 200, "output": "b"}]
    contents_of = {
        "a.jsonl": dump_lines([*records, *odd, *random_records(500, seed=2)]),
        "b.json": b"[" + b",\n".join(dump_lines(random_records(200, seed=3)).splitlines()) + b"]",
        "c.jsonl": b"",
        "d.jsonl.gz": gzip.compress(dump_lines([*random_records(200, seed=4), *odd, *records[:100]])),
        "e.jsonl": b"\xef\xbb\xbf" + dump_lines(random_records(20, seed=5)),
        "f.jsonl": dump_lines([*odd, *records]),
    }
    for name, content in contents_of.items():
        (directory / name).write_bytes(content)
    rows = [record for record in random_records(600, seed=6) if "instruction" in record]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "g.parquet")
    return sorted(directory.iterdir())


POLICIES: dict[str, dict[str, Any]] = {
    "as they are": {},
    "without duplicates": {"duplicates": "drop"},
    "cut": {"too_long": "truncate", "control_tokens": "reject", "duplicates": "drop"},
}


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("part_bytes", [1, 60_000, 300_000])
def test_parts_make_the_same_bytes(
    files: list[Path], tokenizer_dir: Path, tmp_path: Path, policies: dict[str, Any], part_bytes: int
) -> None:
    """Every file of the dataset is that of one process, however the input is cut and in whatever order parts come."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS, **policies}
    with knobs(max_shard_tokens=20_000):
        one = sft_fast.preprocess(files, tmp_path / "one", **options)
    with knobs(max_shard_tokens=20_000, part_bytes=part_bytes):
        parts = sft_fast.preprocess(files, tmp_path / "parts", ray_address="x", num_threads=2, **options)

    names = Executor.made[-1].names
    assert sum(name.startswith("part ") for name in names) > 2
    num_shards = len(list((tmp_path / "one").glob("shard-*")))
    assert sorted(name for name in names if name.startswith("shard-")) == [
        f"shard-{number:05}.safetensors" for number in range(num_shards)
    ]
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")
    assert (parts.fingerprint, parts.rejected_by_reason) == (one.fingerprint, one.rejected_by_reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parts"]


@pytest.mark.usefixtures("in_parts")
def test_the_first_wrong_record_is_named(files: list[Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    """With `raise`, the error is that of one process: the first in the order of the input; nothing is left."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS, "on_error": "raise"}
    errors = []
    for address in ("local", "x"):
        with knobs(**KNOBS), pytest.raises(sft_fast.InputError) as caught:
            sft_fast.preprocess([*files[2:], *files], tmp_path / "out", ray_address=address, **options)
        errors.append((str(caught.value), caught.value.code, caught.value.path, caught.value.line, caught.value.column))

    assert errors[0] == errors[1]
    assert errors[0][1:4] == ("invalid_json", str(files[3]), 201)
    assert list(tmp_path.iterdir()) == []


class Failing(Executor):
    """Is lost after a few tasks."""

    def run(self, name: str, task: str) -> str:
        """Does a task, if it is among the first."""
        if len(self.names) == 5:
            raise ClusterError("all machines are gone")
        return super().run(name, task)


def test_what_is_done_is_found_again(
    files: list[Path], tokenizer_dir: Path, tmp_path: Path, in_parts: Callable[[type[Executor]], None]
) -> None:
    """After a failure, the next run takes the parts that were finished and makes the same bytes; then they are gone."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    cache = tmp_path / "cache"
    in_parts(Failing)
    with knobs(**KNOBS), pytest.raises(ClusterError, match="all machines are gone"):
        sft_fast.ensure_dataset(files, cache, ray_address="x", **options)
    done = {name for name in Executor.made[-1].names if name.startswith("part ")}
    [leftover] = list_cache(cache).leftovers
    assert ".parts-" in leftover.path
    assert len(list(Path(leftover.path).glob("part-??????"))) == len(done) > 3

    in_parts(Executor)
    with knobs(**KNOBS):
        report = sft_fast.ensure_dataset(files, cache, ray_address="x", **options)
    assert not done & set(Executor.made[-1].names)
    assert list_cache(cache).leftovers == ()
    with knobs(max_shard_tokens=20_000):
        sft_fast.preprocess(files, tmp_path / "one", **options)
    assert contents(Path(report.path)) == contents(tmp_path / "one")


def test_parts_of_a_given_up_run_go(
    files: list[Path], tokenizer_dir: Path, tmp_path: Path, in_parts: Callable[[type[Executor]], None]
) -> None:
    """What a failed run has done is removed by pruning the cache, and by a run that makes something else there."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    in_parts(Failing)
    for address in ("x", "local"):
        with knobs(**KNOBS), pytest.raises(ClusterError):
            sft_fast.preprocess(files, tmp_path / "out", ray_address="x", **options)
        assert list(tmp_path.glob(".out.parts-*"))
        in_parts(Executor)
        sft_fast.preprocess(files[:1], tmp_path / "out", ray_address=address, overwrite=True, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        in_parts(Failing)
        (tmp_path / "out").rename(tmp_path / "done")
        for path in (tmp_path / "done").iterdir():
            path.unlink()
        (tmp_path / "done").rmdir()
    with knobs(**KNOBS), pytest.raises(ClusterError):
        sft_fast.ensure_dataset(files, tmp_path, ray_address="x", **options)
    assert len(prune_cache(tmp_path).leftovers) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_made_again(
    files: list[Path], tokenizer_dir: Path, tmp_path: Path, in_parts: Callable[[type[Executor]], None]
) -> None:
    """A part that the storage has damaged is an error that says so, never samples; the next run is whole."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS}

    class Damaging(Executor):
        """Changes a byte of the fourth part."""

        place = 0.0

        def run(self, name: str, task: str) -> str:
            result = super().run(name, task)
            if name == "part 3":
                path = Path(self.directory, "part-000003")
                content = bytearray(path.read_bytes())
                content[int(len(content) * self.place)] ^= 1
                path.write_bytes(content)
            return result

    for place in (0.0, 0.4, 0.6, 0.9):  # in what is put in order, in token ids, and in the index
        Damaging.place = place
        in_parts(Damaging)
        with knobs(**KNOBS), pytest.raises(sft_fast.DatasetError, match="found it damaged"):
            sft_fast.preprocess(files, tmp_path / "out", ray_address="x", **options)
    in_parts(Executor)
    with knobs(**KNOBS):
        sft_fast.preprocess(files, tmp_path / "out", ray_address="x", **options)
    with knobs(max_shard_tokens=20_000):
        sft_fast.preprocess(files, tmp_path / "one", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.usefixtures("in_parts")
def test_only_what_changed_is_encoded(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Other processes, too, take from an older dataset what did not change."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    path = tmp_path / "data.jsonl"
    records = random_records(3000, max_words=5)
    path.write_bytes(dump_lines(records))
    sft_fast.ensure_dataset(path, tmp_path / "cache", **options)
    path.write_bytes(dump_lines(random_records(5, seed=9) + records))
    with knobs(part_bytes=60_000):
        report = sft_fast.ensure_dataset(path, tmp_path / "cache", ray_address="x", **options)
    sft_fast.preprocess(path, tmp_path / "one", **options)

    assert report.num_samples > report.num_reused_samples > 2000
    assert contents(Path(report.path)) == contents(tmp_path / "one")


class Elsewhere(Executor):
    """A machine where something is otherwise."""

    change: Callable[[dict[str, Any]], object] = len

    def run(self, name: str, task: str) -> str:
        """Does a task after the change."""
        value = json.loads(task)
        type(self).change(value)
        return super().run(name, json.dumps(value))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda part: part.update(version="0.0.1"), sft_fast.ConfigError, 'sft-fast "0.0.1" on all machines, found'),
        (lambda part: part["recipe"].update(tokenizer_sha256=""), sft_fast.ConfigError, "the tokenizer and the chat"),
        (lambda part: part["files"][0].update(num_bytes=7), sft_fast.FileError, "expected a file of 7 bytes"),
        (lambda part: part["files"][0].update(path="/nowhere"), sft_fast.FileError, "could not read"),
    ],
    ids=["version", "tokenizer", "other file", "no file"],
)
def test_a_machine_that_is_set_up_otherwise_is_refused(
    files: list[Path],
    tokenizer_dir: Path,
    tmp_path: Path,
    in_parts: Callable[[type[Executor]], None],
    change: Callable[[dict[str, Any]], object],
    kind: type[Exception],
    message: str,
) -> None:
    """Another version, tokenizer or file on a machine is an error that says so; never a part that does not fit."""
    in_parts(type("Changed", (Elsewhere,), {"change": staticmethod(change)}))
    with knobs(**KNOBS), pytest.raises(kind, match=message):
        sft_fast.preprocess(files, tmp_path / "out", ray_address="x", tokenizer=tokenizer_dir, **OPTIONS)


def test_an_address_where_nobody_answers(tokenizer_dir: Path, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    """RAY_ADDRESS or an option that names no cluster is an error at once, with the address and what to do."""
    data = tmp_path / "large.jsonl"
    data.write_bytes(dump_lines(random_records(100, max_words=1000)) * 60)
    command = ("preprocess", data, "--output-dir", "out", "--tokenizer", tokenizer_dir, "--sequence-length", 9999)
    for arguments, environment in ((("--ray-address", "127.0.0.1:9"), {}), ((), {"RAY_ADDRESS": "127.0.0.1:9"})):
        began = time.monotonic()
        result = run_cli(*command, *arguments, **environment)
        assert result.returncode == 2, result.stderr
        assert "no Ray cluster answers at '127.0.0.1:9'" in result.stderr
        assert "ray start --head" in result.stderr
        assert time.monotonic() - began < 20
    assert run_cli(*command, "--ray-address", "local", RAY_ADDRESS="127.0.0.1:9").returncode == 0


def test_without_ray_the_extra_is_named(
    files: list[Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with knobs(**KNOBS), pytest.raises(sft_fast.ConfigError) as caught:
        sft_fast.preprocess(files, tmp_path / "out", ray_address="x:1", tokenizer=tokenizer_dir, **OPTIONS)
    assert (caught.value.code, caught.value.hint) == ("missing_package", "pip install 'sft-fast[ray]'")


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Any]:
    """A Ray cluster of three nodes on this machine, of which this process is no part yet."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def many_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a while."""
    path = tmp_path_factory.mktemp("many") / "data.jsonl"
    path.write_bytes(dump_lines(random_records(3000, max_words=60)) * 4)
    return path


@pytest.mark.ray
def test_a_run_of_a_killed_coordinator_goes_on(
    three_nodes: Any, many_records: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator killed in the middle, the next one takes the finished parts; one node's bytes and hashes."""
    code = (
        "import sys, sft_fast\nfrom tests.data_helpers import knobs\n"
        f"with knobs(**{KNOBS!r}):\n"
        "    file, out, tokenizer, address = sys.argv[1:]\n"
        f"    sft_fast.preprocess(file, out, tokenizer=tokenizer, ray_address=address, **{OPTIONS!r})"
    )
    command = [sys.executable, "-c", code, *map(str, (many_records, tmp_path / "out", tokenizer_dir))]
    root = Path(__file__).parent.parent
    process = subprocess.Popen([*command, three_nodes.address], cwd=root)

    def parts() -> set[str]:
        return {path.name for path in tmp_path.glob(".out.parts-*/part-??????")}

    while len(parts()) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    done = parts()
    executors: list[distributed.RayExecutor] = []

    class Remembered(distributed.RayExecutor):
        """Can be asked afterwards."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            executors.append(self)

    monkeypatch.setattr("sft_fast.data.RayExecutor", Remembered)
    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    with knobs(**KNOBS):
        sft_fast.preprocess(many_records, tmp_path / "out", ray_address=three_nodes.address, **options)
    num_parts = -(-many_records.stat().st_size // KNOBS["part_bytes"])
    assert 0 < sum(executors[0].num_tasks_by_host.values()) <= num_parts - len(done)
    with knobs(max_shard_tokens=20_000):
        sft_fast.preprocess(many_records, tmp_path / "one", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


@pytest.mark.ray
def test_a_lost_node_costs_its_tasks_only(
    three_nodes: Any, many_records: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A node that goes in the middle is noticed, its parts are encoded elsewhere; the bytes are those of one node."""
    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    lost = three_nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    three_nodes.wait_for_nodes()
    gone = []

    def lose_a_node(progress: Any) -> None:
        if progress.num_records > 1000 and not gone:
            three_nodes.remove_node(lost, allow_graceful=False)
            gone.append(True)

    with knobs(**KNOBS):
        sft_fast.preprocess(
            many_records, tmp_path / "out", ray_address=three_nodes.address, progress=lose_a_node, **options
        )
    assert gone
    with knobs(max_shard_tokens=20_000):
        sft_fast.preprocess(many_records, tmp_path / "one", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.ray
def test_a_task_that_dies_each_time_ends_the_run(
    three_nodes: Any, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part whose process dies however often it is tried ends the run with the cause, after a few attempts."""

    def die(*_: Any) -> Any:
        os._exit(1)

    monkeypatch.setattr(distributed, "run_task", die)
    monkeypatch.setattr(distributed, "MAX_ATTEMPTS", 2)
    with knobs(**KNOBS), pytest.raises(ClusterError, match=f"in {distributed.MAX_ATTEMPTS} attempts") as caught:
        sft_fast.preprocess(
            files, tmp_path / "out", ray_address=three_nodes.address, tokenizer=make_tokenizer_dir(tmp_path), **OPTIONS
        )
    assert "ray status" in str(caught.value.hint)
