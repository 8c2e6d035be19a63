"""Google Cloud Storage, against a server that speaks as it does, behind a proxy that does harm."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast.errors import FileError
from sft_fast.objects import fetch, store
from sft_fast.objects.cache import DIRECTORY_VARIABLE
from tests.data_helpers import contents, dump_lines, knobs, plain_samples
from tests.object_helpers import (
    BUCKET,
    RECORDS,
    Fault,
    Proxy,
    Request,
    check_change_while_read,
    check_fault_of_reading,
    google_server,
    made,
    reading,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    """The server of all tests of this file."""
    with google_server() as proxy:
        yield proxy


@pytest.fixture
def proxy(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server with an empty bucket, found by the environment, and an empty cache; waits are short."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google's own servers first
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "objects"))
    monkeypatch.setattr(store, "FIRST_WAIT_SECONDS", 0.001)
    server.reset()
    bucket = files()
    if not bucket.exists(BUCKET):
        bucket.mkdir(BUCKET)
    for name in bucket.find(BUCKET):
        bucket.rm_file(name)
    server.reset()
    yield server
    server.reset()


def files() -> Any:
    """The server as the test sees it."""
    import gcsfs

    return gcsfs.GCSFileSystem(token="anon", use_listings_cache=False)


def put(name: str, content: bytes) -> str:
    """Puts an object into the bucket; its address."""
    files().pipe_file(f"{BUCKET}/{name}", content)
    return f"gs://{BUCKET}/{name}"


def sending(request: Request) -> bool:
    """Matches requests that put an object; what it is called stands in the body."""
    return request.method in ("POST", "PUT") and "/upload/" in request.path


def test_the_same_bytes_as_on_disk(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """From and to Google's storage, every file of a dataset has the bytes that it has from and to a disk."""
    here = tmp_path / "in"
    here.mkdir()
    (here / "a.jsonl").write_bytes(dump_lines(RECORDS))
    (here / "b.jsonl.gz").write_bytes(gzip.compress(dump_lines(RECORDS[:50])))
    for path in here.iterdir():
        put(f"in/{path.name}", path.read_bytes())

    with knobs(max_shard_tokens=5_000):
        local = made(tokenizer_dir, tmp_path / "out", here)
        for source in (f"gs://{BUCKET}/in", f"gs://{BUCKET}/in/*.*"):
            report = made(tokenizer_dir, f"gs://{BUCKET}/out", source)

    assert report.fingerprint == local.fingerprint
    assert report.reused, "guard: the second run has found what the first had sent"
    prefix = f"{BUCKET}/out/"
    there = {path.rpartition("/")[2]: files().cat_file(path) for path in files().find(prefix)}
    expected = contents(tmp_path / "out")
    del there["manifest.json"], expected["manifest.json"]  # which says where the input was
    assert there == expected
    assert len(there) > 4, "guard: there are several shards"
    dataset = sft_fast.Dataset(f"gs://{BUCKET}/out")
    assert plain_samples(dataset) == plain_samples(sft_fast.Dataset(local.path))
    assert dataset[0].source == f"gs://{BUCKET}/in/a.jsonl:1"
    sft_fast.verify(f"gs://{BUCKET}/out")


@pytest.mark.parametrize("kind", ["refuse", "cut", "short", "garble", "slow"])
def test_a_fault_of_reading_is_tried_again(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever happens to answers on the way, the bytes are right in the end, and every further try is counted."""
    monkeypatch.setattr(fetch, "PIECE_BYTES", 4096)
    source = put("data.jsonl", dump_lines(RECORDS))
    check_fault_of_reading(proxy, tokenizer_dir, source, tmp_path, kind)


@pytest.mark.parametrize(("kind", "num_tries"), [("refuse", store.NUM_TRIES), ("wrong", 1)])
def test_a_fault_that_stays_is_refused(
    proxy: Proxy, tokenizer_dir: Path, tmp_path: Path, kind: str, num_tries: int
) -> None:
    """What can't be read is an error of its address after a bounded number of tries, one where more have no use."""
    source = put("data.jsonl", dump_lines(RECORDS))
    proxy.faults = [Fault(kind, reading("data.jsonl"), 1000)]
    with pytest.raises(FileError) as raised:
        made(tokenizer_dir, tmp_path / "new", source)
    assert (raised.value.code, raised.value.path) == ("storage", source)
    assert proxy.faults[0].num_done == num_tries
    assert not (tmp_path / "new").exists()


def test_what_changes_while_it_is_read_is_refused(proxy: Proxy, tokenizer_dir: Path, tmp_path: Path) -> None:
    """An object that is replaced while it is fetched is an error that says so: no listing from before is believed."""
    check_change_while_read(proxy, tokenizer_dir, put, tmp_path, "*.jsonl")


@pytest.mark.parametrize("kind", ["refuse", "cut"])
def test_a_fault_of_writing_is_tried_again(proxy: Proxy, tokenizer_dir: Path, kind: str) -> None:
    """A request to write that fails is made again and counted; where it goes on failing, the old dataset stays."""
    source, out = put("data.jsonl", dump_lines(RECORDS)), f"gs://{BUCKET}/out"
    old = made(tokenizer_dir, out, source)
    proxy.faults = [Fault("refuse", sending, 1000)]
    with pytest.raises(FileError) as raised:
        made(tokenizer_dir, out, source, sequence_length=512, overwrite=True)
    assert raised.value.code == "storage"
    assert sft_fast.Dataset(out).fingerprint == old.fingerprint

    proxy.reset()
    proxy.faults = [Fault(kind, sending, 3)]
    report = made(tokenizer_dir, out, source, sequence_length=512, overwrite=True)
    assert sft_fast.Dataset(out).fingerprint == report.fingerprint != old.fingerprint
    assert 1 <= report.transfer.num_retries <= 3
    assert len({name.rpartition("/")[0] for name in files().find(f"{BUCKET}/out")}) == 2, "the old dataset is gone"


def test_training_reads_what_it_reads_from_a_disk(proxy: Proxy, tmp_path: Path) -> None:
    """A run with records and datasets in Google's storage has the losses of one on a disk."""
    from sft_fast.train.pipeline import SFTPipeline
    from tests.train_helpers import Workspace

    losses = []
    for number, is_remote in enumerate((False, True)):
        workspace = Workspace.create(tmp_path / f"run-{number}", num_records=12)
        config = workspace.config(training={"num_train_epochs": 1}, rows=1, micro_batches=1)
        if is_remote:
            config.sft_train.data_args.file_name = put("r.jsonl", workspace.records.read_bytes())
            config.data_cache_dir = f"gs://{BUCKET}/cache"
        SFTPipeline(config, use_ray=False).run()
        lines = (workspace.root / "logs" / "sft" / "metrics.jsonl").read_text().splitlines()
        losses.append([(line["loss"], line["grad_norm"]) for line in map(json.loads, lines) if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1
    assert files().find(f"{BUCKET}/cache"), "guard: the datasets of the second run are there"
