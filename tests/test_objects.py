"""Object storage, against a real S3 server behind a proxy that does harm: whole and checked, or refused by name."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import sft_fast
from sft_fast import objects
from sft_fast.errors import ConfigError, DatasetError, FileError, InputError
from sft_fast.objects import fetch, store
from sft_fast.objects.cache import DIRECTORY_VARIABLE, SIZE_VARIABLE, ObjectCache
from tests.data_helpers import contents, dump_lines, knobs, plain_samples, random_records
from tests.object_helpers import (
    BUCKET,
    OPTIONS,
    RECORDS,
    SECRET,
    Fault,
    Proxy,
    Request,
    check_change_while_read,
    check_fault_of_reading,
    made,
    object_server,
    reading,
    writing,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    """The server of all tests of this file."""
    with object_server() as proxy:
        yield proxy


@pytest.fixture
def proxy(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server with an empty bucket, found by the environment, and an empty cache; waits are short."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "objects"))
    monkeypatch.setattr(store, "FIRST_WAIT_SECONDS", 0.001)
    server.reset()
    bucket = files()
    if bucket.exists(BUCKET):
        bucket.rm(BUCKET, recursive=True)
    bucket.mkdir(BUCKET)
    server.reset()
    yield server
    server.reset()


def files() -> Any:
    """The server as the test sees it."""
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False, config_kwargs={"retries": {"total_max_attempts": 1}})


def put(name: str, content: bytes) -> str:
    """Puts an object into the bucket; its address."""
    files().pipe_file(f"{BUCKET}/{name}", content)
    return f"s3://{BUCKET}/{name}"


def objects_of(name: str = "") -> dict[str, bytes]:
    """Every object below a name, with its bytes, by what is behind the name."""
    prefix = f"{BUCKET}/{name}".rstrip("/") + "/"
    return {path.removeprefix(prefix): files().cat_file(path) for path in files().find(prefix)}


def without_paths(manifest: bytes) -> Any:
    """A manifest without what says where things were."""
    values = json.loads(manifest)
    for file in values["files"]:
        del file["path"]
    return values


def test_the_same_bytes_as_on_disk(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """From and to object storage, every file of a dataset has the bytes that it has from and to a disk."""
    here = tmp_path / "in"
    here.mkdir()
    (here / "a.jsonl").write_bytes(dump_lines(RECORDS))
    (here / "b.jsonl.gz").write_bytes(gzip.compress(dump_lines(RECORDS[:50])))
    parquet.write_table(
        pa.Table.from_pylist([record for record in RECORDS if "messages" in record][:3]), here / "c.parquet"
    )
    (here / "README").write_bytes(b"no record")
    (here / "deeper").mkdir()
    (here / "deeper" / "d.jsonl").write_bytes(dump_lines(RECORDS))
    for path in here.rglob("*.*"):
        put(str(path.relative_to(tmp_path)), path.read_bytes())
    put("in/README", b"no record")

    with knobs(max_shard_tokens=5_000):
        local = made(tokenizer_dir, tmp_path / "out", here)
        report = made(tokenizer_dir, f"s3://{BUCKET}/out", f"s3://{BUCKET}/in")

    assert report.path == f"s3://{BUCKET}/out"
    assert report.fingerprint == local.fingerprint
    assert report.skipped_files == [f"s3://{BUCKET}/in/README", f"s3://{BUCKET}/in/deeper/"]
    there, expected = objects_of("out"), contents(tmp_path / "out")
    directories = {name.rpartition("/")[0] for name in there}
    assert len(directories) == 2, "all files but the manifest are in one directory"
    by_name = {name.rpartition("/")[2]: content for name, content in there.items()}
    assert without_paths(by_name.pop("manifest.json")) == without_paths(expected.pop("manifest.json"))
    assert by_name == expected
    assert len(by_name) > 4, "guard: there are several shards"

    dataset = sft_fast.Dataset(report.path)
    assert plain_samples(dataset) == plain_samples(sft_fast.Dataset(local.path))
    assert dataset[0].source == f"s3://{BUCKET}/in/a.jsonl:1"
    sft_fast.verify(report.path)
    with knobs(max_shard_tokens=5_000):
        by_glob = made(tokenizer_dir, tmp_path / "other", f"s3://{BUCKET}/in/*.*")
    assert by_glob.fingerprint == local.fingerprint
    assert by_glob.transfer.num_fetched_bytes == 0, "the input was in the cache"
    assert by_glob.transfer.num_cached_bytes > 0
    assert not list((tmp_path / "objects" / "outgoing").glob("*")), "nothing that was sent is left"


def test_files_copied_by_hand_are_read(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A dataset that was made on a disk and copied file by file is a dataset there, too."""
    (tmp_path / "data.jsonl").write_bytes(dump_lines(RECORDS))
    local = made(tokenizer_dir, tmp_path / "out", tmp_path / "data.jsonl")
    for name, content in contents(tmp_path / "out").items():
        put(f"copied/{name}", content)

    assert plain_samples(sft_fast.Dataset(f"s3://{BUCKET}/copied")) == plain_samples(sft_fast.Dataset(local.path))
    report = made(tokenizer_dir, f"s3://{BUCKET}/copied", tmp_path / "data.jsonl", on_error="skip")
    assert report.reused
    made(tokenizer_dir, f"s3://{BUCKET}/copied", tmp_path / "data.jsonl", overwrite=True, sequence_length=512)
    assert [name for name in objects_of("copied") if "/" not in name] == ["manifest.json"]


def test_errors_name_the_object(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """An error in a record has the address, the line and the column; one of an object has its address."""
    address = put("bad.jsonl", dump_lines([RECORDS[0], '{"instruction": "a", "output": }']))
    with pytest.raises(InputError) as raised:
        made(tokenizer_dir, tmp_path / "out", address)
    assert (raised.value.path, raised.value.line, raised.value.column) == (address, 2, 32)

    for missing in (f"s3://{BUCKET}/no.jsonl", f"s3://{BUCKET}/no/*.jsonl", "s3://no-such-bucket/a.jsonl"):
        with pytest.raises(FileError, match="found nothing") as missed:
            made(tokenizer_dir, tmp_path / "out", missing)
        assert missed.value.path == missing
    with pytest.raises(DatasetError, match=r"found no manifest\.json"):
        sft_fast.Dataset(f"s3://{BUCKET}/no")
    put("c.parquet", b"PAR1 and then nothing")
    with pytest.raises(FileError, match="Parquet") as broken:
        made(tokenizer_dir, tmp_path / "out", f"s3://{BUCKET}/c.parquet")
    assert broken.value.path == f"s3://{BUCKET}/c.parquet"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["refuse", "cut", "short", "garble", "slow"])
def test_a_fault_of_reading_is_tried_again(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever happens to answers on the way, the bytes are right in the end, and every further try is counted."""
    monkeypatch.setattr(fetch, "PIECE_BYTES", 4096)
    source = put("data.jsonl", dump_lines(RECORDS))
    check_fault_of_reading(proxy, tokenizer_dir, source, tmp_path, kind)


@pytest.mark.parametrize(
    ("kind", "code"), [("refuse", "storage"), ("cut", "storage"), ("short", "not_whole"), ("garble", "not_whole")]
)
def test_a_fault_that_stays_is_refused(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, kind: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be had right is an error of a name after a bounded number of tries; nothing is kept as whole."""
    source = put("data.jsonl", dump_lines(RECORDS))
    made(tokenizer_dir, f"s3://{BUCKET}/out", source)
    cache = tmp_path / "objects"
    for entry in cache.iterdir():
        entry.rename(tmp_path / entry.name)
    proxy.faults = [Fault(kind, reading(part), 1000) for part in ("data.jsonl", "shard-00000")]
    for place, run in (
        (source, lambda: made(tokenizer_dir, tmp_path / "new", source)),
        (f"s3://{BUCKET}/out/", lambda: sft_fast.Dataset(f"s3://{BUCKET}/out")),
    ):
        with pytest.raises(FileError) as raised:
            run()
        assert raised.value.code == code
        assert str(raised.value.path).startswith(place)
    for fault in proxy.faults:  # below us, a connection that ended may be opened again once
        assert store.NUM_TRIES <= fault.num_done <= 2 * store.NUM_TRIES * (5 if kind == "garble" else 1)
    assert "trying again" in caplog.text
    assert not (tmp_path / "new").exists()
    assert all(path.name.startswith(".") for path in cache.iterdir()), "no entry is there as whole"


def test_what_changes_while_it_is_read_is_refused(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """An object that is replaced while it is fetched is an error that says so, whatever its bytes are."""
    check_change_while_read(proxy, tokenizer_dir, put, tmp_path, "data.jsonl")


@pytest.mark.parametrize("kind", ["refuse", "cut"])
def test_a_fault_of_writing_is_tried_again(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, kind: str) -> None:
    """A request to write that fails is made again and counted; where it goes on failing, the old dataset stays."""
    source = put("data.jsonl", dump_lines(RECORDS))
    out = f"s3://{BUCKET}/out"
    old = made(tokenizer_dir, out, source)
    proxy.faults = [Fault(kind, writing("out/manifest.json"), 1000)]
    with pytest.raises(FileError) as raised:
        made(tokenizer_dir, out, source, sequence_length=512, overwrite=True)
    assert raised.value.code == "storage"
    assert sft_fast.Dataset(out).fingerprint == old.fingerprint

    proxy.reset()
    proxy.faults = [Fault(kind, writing("segments.jsonl")), Fault(kind, writing("manifest.json"), 3)]
    report = made(tokenizer_dir, out, source, sequence_length=512, overwrite=True)
    assert sft_fast.Dataset(out).fingerprint == report.fingerprint != old.fingerprint
    assert 1 <= report.transfer.num_retries <= 3
    assert not proxy.seen("PUT", "shard-"), "what had been sent before is not sent again"
    assert len({name.rpartition("/")[0] for name in objects_of("out")}) == 2, "the old dataset is gone"


def test_where_nobody_may_write(proxy: Proxy, tokenizer_dir: Path) -> None:
    """A bucket that is not there is an error of the place, and what was made is not made again when it is there."""
    source = put("data.jsonl", dump_lines(RECORDS))
    with pytest.raises(FileError, match="could not write") as raised:
        made(tokenizer_dir, "s3://no-bucket-yet/out", source)
    assert raised.value.code == "storage"
    assert str(raised.value.path).startswith("s3://no-bucket-yet/out/")
    files().mkdir("no-bucket-yet")
    assert made(tokenizer_dir, "s3://no-bucket-yet/out", source).reused
    assert len(sft_fast.Dataset("s3://no-bucket-yet/out")) == len(RECORDS)


def test_a_forked_process_reads(proxy: Proxy, tokenizer_dir: Path) -> None:
    """A process forked from one that has fetched can fetch, too: the loaders of torch are made so."""
    import multiprocessing

    made(tokenizer_dir, f"s3://{BUCKET}/out", put("data.jsonl", dump_lines(RECORDS)))
    source = put("other.jsonl", dump_lines(RECORDS[:9]))
    sft_fast.Dataset(f"s3://{BUCKET}/out")
    child = multiprocessing.get_context("fork").Process(target=read_input, args=(source,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
        child.start()
    child.join(60)
    assert child.exitcode == 0


def read_input(address: str) -> None:
    """Fetches a file."""
    from sft_fast.objects.files import fetch_files

    [(path, _)] = fetch_files([address], objects.Transfer())
    assert path.stat().st_size > 0


def test_nothing_is_done_twice(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """What is there already is found by its manifest; another dataset is replaced if asked for, a stranger never."""
    source = put("data.jsonl", dump_lines(RECORDS))
    for place in (f"s3://{BUCKET}/out", f"s3://{BUCKET}/out/"):
        first = made(tokenizer_dir, place, source)
        num_sent = len(proxy.seen("PUT", "out"))
    assert first.reused
    assert num_sent == 4, "a shard, two lists and the manifest, once"
    with pytest.raises(DatasetError, match="found another one"):
        made(tokenizer_dir, f"s3://{BUCKET}/out", source, sequence_length=512)
    before = objects_of()
    stranger = put("full/thesis.tex", b"years of work")
    with pytest.raises(DatasetError, match=r"found 'thesis\.tex'"):
        made(tokenizer_dir, f"s3://{BUCKET}/full", source, overwrite=True)
    assert objects_of() == {**before, stranger.removeprefix(f"s3://{BUCKET}/"): b"years of work"}

    options = {"tokenizer": tokenizer_dir, **OPTIONS}
    cached = [sft_fast.ensure_dataset(source, f"s3://{BUCKET}/cache", **options) for _ in range(2)]
    assert [report.reused for report in cached] == [False, True]
    assert cached[0].path == f"s3://{BUCKET}/cache/{first.fingerprint[:32]}"
    # With a wrong record that was skipped, it is no answer to who wants to see the error.
    bad = put("bad.jsonl", dump_lines([RECORDS[0], "{"]))
    made(tokenizer_dir, f"s3://{BUCKET}/skipped", bad, on_error="skip")
    with pytest.raises(InputError):
        made(tokenizer_dir, f"s3://{BUCKET}/skipped", bad)


@pytest.mark.parametrize("is_cache", [False, True], ids=["directory", "cache"])
def test_only_what_changed_is_encoded(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, is_cache: bool) -> None:
    """Samples of what did not change come from the copy of an older dataset that is here; the bytes are the same."""
    records = random_records(3000, max_words=5)
    options = {"tokenizer": tokenizer_dir, **OPTIONS}

    def make(changed: list[Any]) -> sft_fast.Report:
        source = put("data.jsonl", dump_lines(changed + records))
        if is_cache:
            return sft_fast.ensure_dataset(source, f"s3://{BUCKET}/cache", **options)
        return sft_fast.preprocess(source, f"s3://{BUCKET}/out", overwrite=True, **options)

    assert make([]).num_reused_samples == 0
    proxy.requests.clear()
    report = make(random_records(5, seed=9))
    assert report.num_samples > report.num_reused_samples > 2000
    assert not proxy.seen("GET", "shard-"), "nothing is fetched for it"
    name = report.path.removeprefix(f"s3://{BUCKET}/")
    there = {path.rpartition("/")[2]: content for path, content in objects_of(name).items()}
    (tmp_path / "data.jsonl").write_bytes(files().cat_file(f"{BUCKET}/data.jsonl"))
    sft_fast.preprocess(tmp_path / "data.jsonl", tmp_path / "one", **options)
    expected = contents(tmp_path / "one")
    assert without_paths(there.pop("manifest.json")) == without_paths(expected.pop("manifest.json"))
    assert there == expected
    assert not list((tmp_path / "objects" / "outgoing").glob("*")), "nothing that was sent is left"


# A process of its own: arguments are what to do, tokenizer, and more.
CHILD = f"""
import sys, sft_fast
from sft_fast.objects import fetch
fetch.PIECE_BYTES = 4096
def make(tokenizer, source, out):
    sft_fast.preprocess(source, out, tokenizer=tokenizer, overwrite=True, **{OPTIONS!r})
def read(address):
    dataset = sft_fast.Dataset(address)
    print(dataset.transfer.num_fetched_bytes, flush=True)
    sys.stdin.read()
globals()[sys.argv[1]](*sys.argv[2:])
"""


def start(*arguments: Any) -> "subprocess.Popen[str]":
    """A process that runs CHILD."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def end(process: "subprocess.Popen[str]", number: signal.Signals | None = None) -> None:
    """Ends a process, by a signal or by leaving it alone."""
    if number is not None:
        process.send_signal(number)
    process.communicate()
    assert process.returncode == (0 if number is None else -number)


def pause(proxy: Proxy, matches: Callable[[Request], bool]) -> tuple[threading.Event, threading.Event]:
    """Holds requests that match: (whether one is held, lets them go)."""
    is_held, go = threading.Event(), threading.Event()

    def hold(request: Request) -> None:
        if matches(request):
            is_held.set()
            go.wait(60)

    proxy.before = hold
    return is_held, go


@pytest.mark.parametrize("part", ["shard-00000", "manifest.json"])
def test_killed_while_sending(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, part: str) -> None:
    """Killed while it sends, whatever it sends, the old dataset is whole for every reader; the next run mends all."""
    old_source, new_source = put("old.jsonl", dump_lines(RECORDS[:100])), put("new.jsonl", dump_lines(RECORDS))
    out = f"s3://{BUCKET}/out"
    old = made(tokenizer_dir, out, old_source)
    is_held, go = pause(proxy, writing(f"{part}"))
    process = start("make", tokenizer_dir, new_source, out)
    assert is_held.wait(60)
    end(process, signal.SIGKILL)
    proxy.before = None
    proxy.faults = [Fault("cut", writing(part))]  # the request of the dead process does not arrive
    go.set()
    time.sleep(0.2)
    proxy.reset()

    assert sft_fast.Dataset(out).fingerprint == old.fingerprint
    sft_fast.verify(out)
    report = made(tokenizer_dir, out, new_source, overwrite=True)
    assert not report.transfer.num_retries
    assert sft_fast.Dataset(out).fingerprint == report.fingerprint != old.fingerprint
    assert len({name.rpartition("/")[0] for name in objects_of("out")}) == 2


def test_killed_while_fetching(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process had fetched is not fetched again, and what it left is proved before it is used."""
    source = put("data.jsonl", dump_lines(RECORDS))
    made(tokenizer_dir, f"s3://{BUCKET}/out", source)
    size = len(next(content for name, content in objects_of("out").items() if "shard-" in name))
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "fetching"))
    last = f"bytes={size // 4096 * 4096}-"
    is_held, go = pause(proxy, lambda request: "shard-" in request.path and request.range.startswith(last))
    proxy.requests.clear()
    process = start("read", f"s3://{BUCKET}/out")
    assert is_held.wait(60)
    while len(proxy.seen("GET", "shard-")) < size // 4096 + 1:
        time.sleep(0.01)
    time.sleep(0.3)  # the last answers are on their way
    end(process, signal.SIGKILL)
    go.set()
    proxy.reset()
    [part] = (tmp_path / "fetching").glob(".*.part/content/shard-00000.safetensors")
    content = bytearray(part.read_bytes())
    content[5000] ^= 1  # in the second piece
    part.write_bytes(content)

    process = start("read", f"s3://{BUCKET}/out")
    assert process.stdout is not None
    num_fetched = int(process.stdout.readline())
    end(process)
    assert sorted(request.range.split("-")[0] for request in proxy.seen("GET", "shard-")) == sorted(
        ["bytes=4096", last.rstrip("-")]
    )
    assert 4096 < num_fetched < size // 2
    sft_fast.verify(f"s3://{BUCKET}/out")


def test_processes_share_the_cache(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes that want the same at once, one fetches it; what they use, no other may remove."""
    source = put("data.jsonl", dump_lines(RECORDS))
    made(tokenizer_dir, f"s3://{BUCKET}/out", source)
    made(tokenizer_dir, f"s3://{BUCKET}/other", source, sequence_length=512)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "shared"))
    proxy.requests.clear()
    processes = [start("read", f"s3://{BUCKET}/out") for _ in range(3)]
    fetched = []
    for process in processes:
        assert process.stdout is not None
        fetched.append(int(process.stdout.readline()))
    ranges = [request.range for request in proxy.seen("GET", "shard-")]
    assert len(ranges) == len(set(ranges)) > 3
    assert sorted(size > 20_000 for size in fetched) == [False, False, True]

    cache = ObjectCache.of_environment()
    monkeypatch.setenv(SIZE_VARIABLE, str(cache.num_bytes() + 1000))
    with pytest.raises(FileError, match="in use") as raised:
        sft_fast.Dataset(f"s3://{BUCKET}/other")
    assert raised.value.code == "cache_full"
    for process in processes:
        end(process)
    sft_fast.Dataset(f"s3://{BUCKET}/other")
    assert cache.num_bytes() <= int(os.environ[SIZE_VARIABLE])
    assert not list((tmp_path / "shared").glob("*.trash*"))


def test_the_cache_stays_under_its_limit(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However datasets are opened, by however many threads, all entries together never exceed the limit.

    The one used longest ago goes first, and what is too large for all of it is refused by name.
    """
    source = put("data.jsonl", dump_lines(RECORDS))
    places = [f"s3://{BUCKET}/out-{number}" for number in range(4)]
    for number, place in enumerate(places):
        made(tokenizer_dir, place, source, sequence_length=512 + number)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "small"))
    one = sft_fast.Dataset(places[0]).transfer.num_fetched_bytes
    limit = int(2.5 * one)
    monkeypatch.setenv(SIZE_VARIABLE, str(limit))
    cache, highest, is_over = ObjectCache.of_environment(), [0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            on_disk = sum(size for name, size in walk(tmp_path / "small") if name != "pieces")
            highest[0] = max(highest[0], on_disk, cache.num_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    order = random.Random(3)
    for _ in range(12):
        place = order.choice(places)
        assert len(sft_fast.Dataset(place)) == len(RECORDS)
    is_over.set()
    watcher.join()
    # Notes and the record of pieces come on top: less than 2 kB an entry.
    assert one < highest[0] <= limit + 6_000

    for place in (places[0], places[1], places[0], places[2]):
        sft_fast.Dataset(place)
    proxy.requests.clear()
    sft_fast.Dataset(places[0])
    assert not proxy.seen("GET", "shard-"), "it was used after the one that had to go"
    sft_fast.Dataset(places[1])
    assert proxy.seen("GET", "shard-")
    monkeypatch.setenv(SIZE_VARIABLE, str(one // 2))
    with pytest.raises(FileError) as raised:
        sft_fast.Dataset(places[3])
    assert raised.value.code == "cache_full"
    monkeypatch.setenv(SIZE_VARIABLE, "much")
    with pytest.raises(ConfigError, match="a size such as"):
        sft_fast.Dataset(places[3])


def walk(directory: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each file below a directory that others change meanwhile."""
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                yield name, os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue


def test_a_damaged_entry_is_made_again(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """A copy that somebody cut short is fetched again."""
    source = put("data.jsonl", dump_lines(RECORDS))
    made(tokenizer_dir, f"s3://{BUCKET}/out", source)
    [shard] = (tmp_path / "objects").glob("*/content/shard-*")
    os.truncate(shard, 100)
    assert len(sft_fast.Dataset(f"s3://{BUCKET}/out")) == len(RECORDS)
    sft_fast.verify(f"s3://{BUCKET}/out")


def test_replaced_while_it_is_read(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads a dataset while it is replaced has the old one or the new one, whole."""
    source, out = put("data.jsonl", dump_lines(RECORDS)), f"s3://{BUCKET}/out"
    made(tokenizer_dir, out, source)
    new: list[sft_fast.Report] = []

    def replace(request: Request) -> None:
        if reading("shard-")(request):
            proxy.before = None
            new.append(made(tokenizer_dir, out, source, sequence_length=512, overwrite=True))

    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "reader"))
    proxy.before = replace
    assert sft_fast.Dataset(out).fingerprint == new[0].fingerprint


def test_training_reads_what_it_reads_from_a_disk(
    proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with records and datasets in object storage has the losses of one on a disk, and no secret is written."""
    from sft_fast.train.pipeline import SFTPipeline
    from tests.train_helpers import Workspace

    losses = []
    for number, is_remote in enumerate((False, True)):
        workspace = Workspace.create(tmp_path / f"run-{number}", num_records=12)
        config = workspace.config(
            training={"num_train_epochs": 2},
            rows=1,
            micro_batches=1,
            system_envs={"AWS_SECRET_ACCESS_KEY": SECRET},
            validation=True,
        )
        if is_remote:
            config.sft_train.data_args.file_name = put("r.jsonl", workspace.records.read_bytes())
            config.data_cache_dir = f"s3://{BUCKET}/cache"
        SFTPipeline(config, use_ray=False).run()
        lines = (workspace.root / "logs" / "sft" / "metrics.jsonl").read_text().splitlines()
        losses.append([(line["loss"], line["grad_norm"]) for line in map(json.loads, lines) if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 3
    assert objects_of("cache"), "guard: the datasets of the second run are there"
    written = b"".join(path.read_bytes() for path in (tmp_path / "run-1").rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET not in "".join(capsys.readouterr())


def test_commands_take_addresses(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`preprocess`, `verify` and `inspect` take addresses, and a report says what was moved."""
    source, out = put("data.jsonl", dump_lines([*RECORDS, "{"])), f"s3://{BUCKET}/out"
    options = ["--tokenizer", tokenizer_dir, "--sequence-length", "1024", "--system-key", "system"]
    result = run_cli("preprocess", source, "--output-dir", out, *options, "--query-key", "input", "--on-error", "skip")
    assert result.returncode == 0, result.stderr
    assert "object storage" in result.stdout
    assert "sent" in result.stdout
    assert run_cli("verify", out).stdout == f"{out}: whole, 300 samples, {result_tokens(out):,} tokens\n"
    found = run_cli("inspect", out, "--source", f"{source}:301")
    assert "invalid_json" in found.stdout + found.stderr
    again = run_cli("preprocess", source, "--output-dir", out, *options, "--query-key", "input")
    assert again.returncode == 2
    assert f"{source}:301:2" in again.stderr


def result_tokens(address: str) -> int:
    """Tokens of a dataset."""
    return int(sft_fast.Dataset(address).manifest["num_tokens"])


def test_what_is_missing_is_named(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library for an address, or without such a library at all, the error says what to do."""
    import fsspec

    monkeypatch.setitem(sys.modules, "s3fs", None)
    fsspec.get_filesystem_class.__globals__["_registry"].pop("s3", None)
    with pytest.raises(ConfigError, match="not installed") as raised:
        sft_fast.Dataset(f"s3://{BUCKET}/out")
    assert raised.value.hint == "pip install 'sft-fast[s3]'"
    with pytest.raises(ConfigError, match="what kind of storage"):
        sft_fast.Dataset("nowhere://bucket/out")
    monkeypatch.undo()


def test_paths_of_this_machine_are_no_addresses(tokenizer_dir: Path, tmp_path: Path) -> None:
    """`file:///path` is the path, for input and output, and nothing of it goes through a cache."""
    (tmp_path / "data.jsonl").write_bytes(dump_lines(RECORDS))
    report = made(tokenizer_dir, f"file://{tmp_path}/out", f"file://{tmp_path}/data.jsonl")
    assert report.path == f"{tmp_path}/out"
    assert report.transfer == objects.Transfer()
    assert sft_fast.Dataset(f"file://{tmp_path}/out")[0].source == f"{tmp_path}/data.jsonl:1"
