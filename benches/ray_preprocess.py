"""Preprocessing on a Ray cluster: what each part of the work costs; from these follows what the limit is, and when.

    python benches/ray_preprocess.py                                 # clusters of 1, 2 and 3 nodes of one core
    python benches/ray_preprocess.py --nodes 1,2 --megabytes 1000 --data chats.jsonl

The nodes are of one machine, so wall times say something only up to the number of its cores; seconds of a core say
what many machines would do. That the data set is that of one machine, to the byte, is checked before anything counts.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import run

OPTIONS: dict[str, Any] = {
    "sequence_length": 65_536, "query_key": "input", "control_tokens": "allow", "on_error": "skip",
}  # fmt: skip
BUILD = run.BUILD / "ray"
NOTES_VARIABLE = "SFT_FAST_BENCH_NOTES"


def peak_megabytes() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measured_task(task: Any, get_model: Any) -> Any:
    """A function that runs as a task of the cluster and writes down what it cost."""

    def work(*arguments: Any) -> Any:
        begin = time.process_time()
        get_model(arguments)
        loaded = time.process_time()
        result = task(*arguments)
        note = {"load": loaded - begin, "work": time.process_time() - loaded, "peak": peak_megabytes()}
        name = f"{task.__name__}-{os.getpid()}-{time.monotonic_ns()}"
        Path(os.environ[NOTES_VARIABLE], name).write_text(json.dumps(note), encoding="utf-8")
        return result

    return work


def child(arguments: dict[str, Any]) -> None:
    """One call of `preprocess`, in a process of its own; prints what it cost as JSON."""
    import sft_fast
    from sft_fast import distributed

    ray_seconds = [0.0]

    def counted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            try:
                return method(*arguments)
            finally:
                ray_seconds[0] += time.process_time() - begin

        return call

    for name in ("begin", "submit", "poll", "close"):
        setattr(distributed.RayExecutor, name, counted(getattr(distributed.RayExecutor, name)))

    def get_model(part: Any) -> None:
        distributed._runner(*part[2:5])

    distributed.run_task = measured_task(distributed.run_task, get_model)
    before, start = time.process_time(), time.perf_counter()
    report = sft_fast.preprocess(**arguments, **OPTIONS)
    print(json.dumps({
        "wall": time.perf_counter() - start, "cpu": time.process_time() - before, "ray": ray_seconds[0],
        "peak": peak_megabytes(), "reused": report.reused, "num_bytes": report.num_bytes,
        "num_tokens": report.num_tokens, "num_samples": report.num_samples,
    }))  # fmt: skip


def measure(address: str = "local", notes: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """What a call of `preprocess` cost, and what its tasks noted."""
    notes = notes or BUILD / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    values = {name: [*map(str, value)] if isinstance(value, list) else str(value) for name, value in arguments.items()}
    call = json.dumps({**values, "ray_address": address})
    result = subprocess.run([sys.executable, __file__, "--child", call], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stderr)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    found["tasks"] = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.iterdir())]
    return found


def digest(directory: Path) -> dict[str, str]:
    """SHA-256 of each file of a data set."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def hashing(files: list[Path], tokenizer: Path, out: Path) -> float:
    """Seconds of a core that finding the data set of an input takes, less what is the same for the smallest input."""
    small = BUILD / "small.jsonl"
    small.write_bytes(files[0].read_bytes().partition(b"\n")[0] + b"\n")
    seconds = []
    for source, place in (([small], BUILD / "small"), (files, out)):
        measure(files=source, output_dir=place, tokenizer=tokenizer)
        runs = [measure(files=source, output_dir=place, tokenizer=tokenizer) for _ in range(3)]
        assert all(one["reused"] for one in runs)
        seconds.append(min(one["cpu"] for one in runs))
    return seconds[1] - seconds[0]


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,3", help="numbers of nodes, of one core each (default %(default)s)")
    parser.add_argument("--megabytes", type=float, default=400.0, help="of records (default %(default)s)")
    parser.add_argument("--data", nargs="+", type=Path, help="JSON Lines; by default made of text of this machine")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    from ray.cluster_utils import Cluster

    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    files = [file.resolve() for file in options.data or corpus.make(BUILD / "corpus", options.megabytes / 2)]
    tokenizer = run.model_directory(run.MODELS[0][1])
    one = measure(files=files, output_dir=BUILD / "one", tokenizer=tokenizer)
    expected = digest(BUILD / "one")
    megabytes = one["num_bytes"] / 1e6
    data_bytes = sum(path.stat().st_size for path in (BUILD / "one").iterdir())
    seconds_hashing = hashing(files, tokenizer, BUILD / "one")
    print(
        f"{run.machine()}\n\n{megabytes:.0f} MB of records, {one['num_samples']:,} samples, "
        f"{one['num_tokens']:,} tokens, data set of {data_bytes / 1e6:.0f} MB, Qwen2.5.\n\n"
        f"One process: {one['wall']:.1f} s, {one['cpu']:.1f} core-s, of which hashing {seconds_hashing:.2f}; "
        f"peak {one['peak']:.0f} MB.\n"
    )
    print("| nodes | wall s | coordinator core-s | hashing | Ray | the rest | tasks core-s | peak MB | of a task |")
    print("|---|---|---|---|---|---|---|---|---|")
    os.environ[NOTES_VARIABLE] = str(BUILD / "notes")
    for num_nodes in map(int, options.nodes.split(",")):
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(num_nodes - 1):
            cluster.add_node(**node)
        try:
            out = BUILD / f"nodes-{num_nodes}"
            found = measure(cluster.address, files=files, output_dir=out, tokenizer=tokenizer)
        finally:
            cluster.shutdown()
        if digest(out) != expected:
            raise SystemExit(f"the data set of {num_nodes} nodes is not that of one machine")
        work = sum(task["work"] for task in found["tasks"])
        rest = found["cpu"] - found["ray"] - seconds_hashing
        print(
            f"| {num_nodes} | {found['wall']:.1f} | {found['cpu']:.2f} | {seconds_hashing:.2f} | {found['ray']:.2f} "
            f"| {rest:.2f} | {work:.1f} | {found['peak']:.0f} | {max(task['peak'] for task in found['tasks']):.0f} |",
            flush=True,
        )
    rate = megabytes / work
    print(
        f"\nA core of a task encodes {rate:.0f} MB/s; one of the coordinator hashes "
        f"{megabytes / seconds_hashing:.0f} MB/s and puts {megabytes / rest:.0f} MB/s together."
    )


if __name__ == "__main__":
    main()
