"""Preprocessing on machines in network namespaces: one is killed, a link is cut and healed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from tests.data_helpers import contents, dump_lines, knobs, random_records
from tests.node_helpers import Machines, ip, machines_here

pytestmark = [pytest.mark.nodes, pytest.mark.ray]

NUM_MACHINES = 3
OPTIONS: dict[str, Any] = {"sequence_length": 128, "system_key": "system", "query_key": "input", "on_error": "skip"}
# Many small parts, so that there is a middle; the shards are those of a run of one machine with the same knob.
SHARDS = {"max_shard_tokens": 20_000}
PARTS = {"part_bytes": 60_000, **SHARDS}


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """The machines of all tests of this file."""
    with machines_here(NUM_MACHINES) as machines:
        yield machines


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a while."""
    path = tmp_path_factory.mktemp("records") / "data.jsonl"
    path.write_bytes(dump_lines(random_records(3000, max_words=60)) * 16)
    return path


@pytest.fixture(scope="module")
def expected(records: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one machine makes of them."""
    out = tmp_path_factory.mktemp("one") / "out"
    with knobs(**SHARDS):
        sft_fast.preprocess(records, out, tokenizer=tokenizer_dir, ray_address="local", **OPTIONS)
    return contents(out)


def test_a_killed_machine_costs_its_parts_only(
    machines: Machines, records: Path, expected: dict[str, bytes], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A machine that loses its power in the middle costs what it was at: the bytes are those of one machine."""
    lost = machines.add()
    killed: list[float] = []

    def kill(progress: Any) -> None:
        if progress.num_records > 1000 and not killed:
            machines.kill(lost)
            killed.append(time.monotonic())

    with knobs(**PARTS):
        sft_fast.preprocess(
            records, tmp_path / "out", tokenizer=tokenizer_dir, ray_address=machines.address, progress=kill, **OPTIONS
        )
    assert killed
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("seconds", [0.5, 1e9], ids=["healed before it is noticed", "noticed"])
def test_a_link_that_is_cut(
    machines: Machines, records: Path, expected: dict[str, bytes], tokenizer_dir: Path, tmp_path: Path, seconds: float
) -> None:
    """A machine out of reach for a while, noticed or not, changes nothing of what is made."""
    link = machines.link(machines.numbers[0])
    cut: list[float] = []
    healed: list[float] = []

    def cut_and_heal(progress: Any) -> None:
        if progress.num_records > 1000 and not cut:
            ip("link", "set", link, "down")
            cut.append(time.monotonic())
        if cut and not healed and time.monotonic() - cut[0] > seconds:
            ip("link", "set", link, "up")
            healed.append(time.monotonic())

    try:
        with knobs(**PARTS):
            sft_fast.preprocess(
                records,
                tmp_path / "out",
                tokenizer=tokenizer_dir,
                ray_address=machines.address,
                progress=cut_and_heal,
                **OPTIONS,
            )
    finally:
        ip("link", "set", link, "up")
    assert cut
    assert bool(healed) == (seconds < 1)
    assert contents(tmp_path / "out") == expected
