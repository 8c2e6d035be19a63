"""What a data set and a training of a given size cost in memory, disk, network and time, by the planner's real plan.

`python benches/scale.py --samples 1e7 --mix chat` plans an epoch of that many samples as a run does, checks that each
sample comes once, and says what follows for 8, 256 and 4,096 devices. Sizes are reckoned from the formats; times of the
plan and memory are measured; everything else follows from the assumptions, which are options and are printed. `--json`
prints the numbers. docs/scale.md has the outcome.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sft_fast import _core

# Of a shard: bytes of a token with a large vocabulary (id and mask bit), and of a sample (offset, file and line).
BYTES_PER_TOKEN = 4 + 1 / 8
BYTES_PER_SAMPLE = 12
# The first shard takes so many tokens, the second twice as many, and so on up to so many times.
FIRST_SHARD_TOKENS, LARGEST_SHARD = 1 << 19, 64
PAGE_BYTES = 4096
DEVICES_PER_NODE = 8
# Linux lets a process map so many files unless vm.max_map_count says otherwise.
MAX_MAPS = 65_530
MAX_SAMPLES = 2**32 - 1


@dataclass(frozen=True)
class Mix:
    """A log-normal mix of lengths, in tokens. Longer samples are cut to `capacity`, or dropped."""

    median: float
    sigma: float
    shortest: int
    capacity: int
    drops_longer: bool = False

    def lengths(self, num_samples: int, seed: int = 1) -> NDArray[np.uint32]:
        """uint32 [num_samples], made in parts so that memory holds little besides."""
        random = np.random.default_rng(seed)
        lengths = np.empty(num_samples, np.uint32)
        num_done = 0
        while num_done < num_samples:
            part = random.lognormal(np.log(self.median), self.sigma, min(1 << 22, num_samples - num_done + 1000))
            if self.drops_longer:
                part = part[part <= self.capacity]
            part = np.clip(part[: num_samples - num_done], self.shortest, self.capacity).astype(np.uint32)
            lengths[num_done : num_done + len(part)] = part
            num_done += len(part)
        return lengths


MIXES = {
    "alpaca": Mix(90, 0.75, 16, 2_048),
    "chat": Mix(309, 0.75, 20, 4_096),
    "tulu": Mix(650, 0.95, 32, 8_192),
    "reasoning-16k": Mix(6_000, 0.8, 200, 16_384, drops_longer=True),
    "reasoning-32k": Mix(6_000, 0.8, 200, 32_768, drops_longer=True),
}


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted, since no simulation can measure it."""

    parameters: float = 8e9
    """Of the model."""
    teraflops: float = 400.0
    """10^12 operations a second that a device really does."""
    text_bytes_per_token: float = 4.5
    """Bytes of JSON for a token."""
    preprocess_megabytes: float = 90.0
    """10^6 bytes of JSON that a core makes into samples in a second."""
    cores: int = 64
    """Of a node."""
    network_gigabits: float = 25.0
    """10^9 bits a second between a node and the storage."""
    fetch_megabytes: float = 290.0
    """10^6 bytes a second that the process that fetches a copy moves and checks, where the network gives more."""
    disk_megabytes: float = 3_000.0
    """10^6 bytes a second that the disk of a node reads or writes."""
    rows_per_device: int = 1
    """Packs of a step on each device."""


@dataclass(frozen=True)
class Plan:
    """The plan of an epoch, and what it took."""

    num_samples: int
    num_tokens: int
    num_packs: int
    fill_ratio: float
    seconds: float
    peak_bytes: int
    """Most memory of this process while it planned, lengths included, and what Python has loaded."""
    kept_bytes: int
    """Of lengths, packs and steps, which a rank keeps."""


@dataclass(frozen=True)
class Run:
    """What a training by a plan needs, at a number of devices."""

    num_devices: int
    num_nodes: int
    num_steps: int
    imbalance_in_order: float
    imbalance: float
    """How much longer than the mean rank the slowest takes, over all steps, by the cost model of the planner."""
    step_seconds: float
    """By the operations of the model, and the slowest rank."""
    epoch_hours: float
    node_token_megabytes: float
    """10^6 bytes of tokens that a node needs a second."""
    node_read_megabytes: float
    """The same as whole pages of the disk, where nothing is in the page cache."""
    node_reads: float
    """Samples whose tokens a node reads a second, each at another place."""
    node_mask_reads: float
    """Samples whose masks it reads: of the whole step, since each rank counts the label tokens of all."""
    node_fetch_seconds: float
    """To fetch a copy of the data set to each node."""
    all_fetched_bytes: int
    """What the storage gives to all nodes."""
    node_plan_bytes: int
    """Memory for the plans of all ranks of a node, two epochs each."""


@dataclass(frozen=True)
class Sizes:
    """A data set on disk."""

    text_bytes: int
    dataset_bytes: int
    num_shards: int
    preprocess_hours: float
    """On one node: of its cores, or of its disk, where that takes longer."""


def make_plan(
    lengths: NDArray[np.uint32], capacity: int, num_rows_per_step: int
) -> tuple[Plan, NDArray[np.uint32], NDArray[np.uint32], _core.Steps]:
    """Plans an epoch with the project's planner; the plan, its packs and its steps."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    start = time.perf_counter()
    offsets, samples, steps = _core.plan_lengths(lengths, capacity, 42, 0, num_rows_per_step)
    seconds = time.perf_counter() - start
    num_tokens, num_packs = int(lengths.sum(dtype=np.uint64)), len(offsets) - 1
    plan = Plan(
        num_samples=len(lengths),
        num_tokens=num_tokens,
        num_packs=num_packs,
        fill_ratio=num_tokens / max(num_packs * capacity, 1),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        kept_bytes=kept_bytes(len(lengths), num_packs),
    )
    return plan, offsets, samples, steps


def kept_bytes(num_samples: int, num_packs: int) -> int:
    """Of a sample 4 for its length and 4 for its number; of a pack 4 for its offset, 8 for its cost, 4 for its step."""
    return 8 * num_samples + 16 * num_packs


def check_plan(
    lengths: NDArray[np.uint32], capacity: int, offsets: NDArray[np.uint32], samples: NDArray[np.uint32]
) -> None:
    """Raises an `AssertionError` unless each sample is in one pack, and no pack holds more than `capacity`."""
    times = np.zeros(len(lengths), np.uint8)
    num_tokens = 0
    part = 1 << 20
    for first in range(0, len(offsets) - 1, part):
        bounds = offsets[first : first + part + 1].astype(np.int64)
        members = samples[bounds[0] : bounds[-1]]
        tokens = np.add.reduceat(lengths[members].astype(np.int64), bounds[:-1] - bounds[0])
        assert tokens.max() <= capacity, "a pack is too long"
        num_tokens += int(tokens.sum())
        times[members] += 1  # within a pack, and between packs of a part, a number that came twice would count once
    assert len(samples) == len(lengths), "samples are missing, or there are too many"
    assert (times == 1).all(), "a sample is missing"
    assert num_tokens == int(lengths.sum(dtype=np.uint64)), "tokens do not add up"


def peak_bytes() -> int:
    """Most memory of this process since the peak began anew."""
    with open("/proc/self/status") as file:
        line = next((line for line in file if line.startswith("VmHWM:")), None)
    return int(line.split()[1]) * 1024 if line else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def num_shards(num_tokens: int) -> int:
    """How many shards hold so many tokens, if all but the last are full; docs/format.md."""
    growing = list(itertools.accumulate(FIRST_SHARD_TOKENS * number for number in range(1, LARGEST_SHARD + 1)))
    rest = max(0, num_tokens - growing[-1])
    return bisect.bisect_left(growing, num_tokens - rest) + 1 + -(-rest // (FIRST_SHARD_TOKENS * LARGEST_SHARD))


def sizes_of(num_samples: int, num_tokens: int, assumed: Assumptions) -> Sizes:
    """What the data set is on disk, and what it takes to make it."""
    text_bytes = num_tokens * assumed.text_bytes_per_token
    dataset_bytes = num_tokens * BYTES_PER_TOKEN + num_samples * BYTES_PER_SAMPLE
    encoding = text_bytes / (assumed.preprocess_megabytes * 1e6 * assumed.cores)
    moving = (2 * text_bytes + dataset_bytes) / (assumed.disk_megabytes * 1e6)  # read to be hashed, and to be encoded
    return Sizes(
        text_bytes=int(text_bytes),
        dataset_bytes=int(dataset_bytes),
        num_shards=num_shards(num_tokens),
        preprocess_hours=max(encoding, moving) / 3600,
    )


def run_of(plan: Plan, steps: _core.Steps, num_devices: int, pages_per_sample: float, assumed: Assumptions) -> Run:
    """A training by the plan: the packs of each step dealt to the devices as the trainer deals them."""
    in_order, imbalance = steps.imbalance(num_devices)
    num_nodes = -(-num_devices // DEVICES_PER_NODE)
    num_steps = len(steps)
    operations = 6 * assumed.parameters * plan.num_tokens / num_steps  # of a step
    step_seconds = operations / (num_devices * assumed.teraflops * 1e12) * (1 + imbalance)
    dataset_bytes = sizes_of(plan.num_samples, plan.num_tokens, assumed).dataset_bytes
    node_tokens = plan.num_tokens / num_steps / num_nodes / step_seconds
    node_samples = plan.num_samples / num_steps / num_nodes / step_seconds
    return Run(
        num_devices=num_devices,
        num_nodes=num_nodes,
        num_steps=num_steps,
        imbalance_in_order=in_order,
        imbalance=imbalance,
        step_seconds=step_seconds,
        epoch_hours=step_seconds * num_steps / 3600,
        node_token_megabytes=node_tokens * BYTES_PER_TOKEN / 1e6,
        node_read_megabytes=node_samples * pages_per_sample * PAGE_BYTES / 1e6,
        node_reads=node_samples,
        node_mask_reads=plan.num_samples / num_steps / step_seconds,
        node_fetch_seconds=dataset_bytes / min(assumed.network_gigabits * 1e9 / 8, assumed.fetch_megabytes * 1e6),
        all_fetched_bytes=dataset_bytes * num_nodes,
        node_plan_bytes=DEVICES_PER_NODE * (plan.kept_bytes + 4 * plan.num_samples + 16 * plan.num_packs),
    )


def pages_of(lengths: NDArray[np.uint32]) -> float:
    """Pages of the disk that a sample lies on, in the mean: those of its ids, wherever they begin; one of its mask."""
    part = lengths[: 1 << 22].astype(np.float64)
    return float(np.mean((4 * part - 1) / PAGE_BYTES + 1)) + 1


def limits(num_samples: int, num_tokens: int, node_memory_bytes: float, plan_bytes: int) -> Iterator[str]:
    """What such a size runs into, by the widths and bounds of the code and of Linux."""
    if num_samples > MAX_SAMPLES:
        yield f"sample numbers are 32 bits wide: more than {MAX_SAMPLES:,} samples are refused"
    if num_shards(num_tokens) > MAX_MAPS:
        yield f"each shard is mapped: more than {MAX_MAPS:,} need a larger vm.max_map_count"
    if plan_bytes > node_memory_bytes:
        yield f"the plans of the ranks of a node take {plan_bytes / 1e9:,.0f} GB"


def simulate(
    mix: Mix, num_samples: int, devices: Sequence[int], assumed: Assumptions, check: bool = True
) -> dict[str, object]:
    """The numbers of a size."""
    lengths = mix.lengths(num_samples)
    runs = []
    for number, num_devices in enumerate(devices):
        plan, offsets, samples, steps = make_plan(lengths, mix.capacity, num_devices * assumed.rows_per_device)
        if check and number == 0:
            check_plan(lengths, mix.capacity, offsets, samples)
        runs.append(run_of(plan, steps, num_devices, pages_of(lengths), assumed))
        del offsets, samples, steps
    return {
        "plan": asdict(plan),
        "sizes": asdict(sizes_of(plan.num_samples, plan.num_tokens, assumed)),
        "runs": [asdict(run) for run in runs],
        "limits": list(limits(plan.num_samples, plan.num_tokens, 1e12, max(run.node_plan_bytes for run in runs))),
    }


def extrapolated(measured: dict[str, dict[str, float]], num_samples: int) -> dict[str, float]:
    """A plan that this machine cannot hold, from the two largest that it can: times and sizes grow by the same power.

    Args:
        measured: Plans, as `simulate` gives them, by their number of samples as a text.
        num_samples: Of the plan that is wanted.
    """
    (small, a), (large, b) = sorted((float(size), plan) for size, plan in measured.items())[-2:]
    result = {}
    for name in ("num_tokens", "num_packs", "seconds", "kept_bytes"):
        power = np.log(b[name] / a[name]) / np.log(large / small)
        result[name] = float(b[name] * (num_samples / large) ** power)
    return result


def main() -> None:
    """Prints tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", default="1e6", help="sizes, such as 1e6,1e7")
    parser.add_argument("--mix", default="chat", help=f"one or more of {', '.join(MIXES)}")
    parser.add_argument("--devices", default="8,256,4096")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-check", action="store_true", help="do not check that each sample comes once")
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    assumed = Assumptions(**{name: getattr(options, name) for name in asdict(Assumptions())})
    devices = [int(number) for number in options.devices.split(",")]
    for name in options.mix.split(","):
        for size in options.samples.split(","):
            result = simulate(MIXES[name], int(float(size)), devices, assumed, not options.no_check)
            if options.json:
                print(json.dumps({"mix": name, "assumed": asdict(assumed), **result}), flush=True)
            else:
                print_result(name, result)


def print_result(name: str, result: dict[str, object]) -> None:
    """A size as text."""
    print(f"\n{name}")
    for part in ("plan", "sizes"):
        print(f"  {part}: " + ", ".join(f"{key} {shown(value)}" for key, value in result[part].items()))  # type: ignore[attr-defined]
    for run in result["runs"]:  # type: ignore[attr-defined]
        print("  " + ", ".join(f"{key} {shown(value)}" for key, value in run.items()))
    for limit in result["limits"]:  # type: ignore[attr-defined]
        print(f"  limit: {limit}")


def shown(value: float) -> str:
    """A number to read."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
