"""How long a checkpoint holds training, at once and beside it, on the CPU: `benches/async_save.py [--million 120]`.

A model of random weights of about that many million parameters trains in bfloat16 with 32-bit masters, so that a
checkpoint has 14 bytes a parameter. Steps are timed without a save; with a save at once, up to the disk; and with a
save beside them, whose copy and whose effect on the steps meanwhile are told apart. Everything is read back from the
disk at the end, and both checkpoints must load to the same weights.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from sft_fast.train.checkpoint import sync_files
from tests.train_helpers import Workspace, start_worker

NUM_STEPS = 4


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", type=int, default=120)
    parser.add_argument("--directory", type=Path, help="where checkpoints go; by default a temporary directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        measure(Path(directory), arguments.million)


def measure(root: Path, million: int) -> None:
    """One worker: steps, a save at once, a save beside steps."""
    num_layers = max(1, round(million / 12.6))
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": num_layers}
    workspace = Workspace.create(root, num_records=400, num_attention_heads=16, num_key_value_heads=16, **sizes)
    config = workspace.config(model={"dtype": "bf16"}, training={"max_steps": 1000}, rows=1, micro_batches=1)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    worker = start_worker(config)
    numbers = iter(range(1000))

    def timed_step() -> float:
        start = time.perf_counter()
        worker.train_step(next(numbers))
        return time.perf_counter() - start

    timed_step()
    alone = [timed_step() for _ in range(NUM_STEPS)]
    start = time.perf_counter()
    worker.do_checkpoint(str(root / "at-once"))
    sync_files(root / "at-once")
    at_once = time.perf_counter() - start

    held = worker.do_checkpoint(str(root / "beside"), True)
    meanwhile = []
    while (report := worker.finish_checkpoint(False)) is None:
        meanwhile.append(timed_step())
    num_bytes = sum(path.stat().st_size for path in (root / "beside").rglob("*") if path.is_file())
    worker.close()
    compare(root)
    print(f"checkpoint of {num_bytes / 1e9:.2f} GB, a step alone takes {statistics.median(alone):.2f} s")
    print(f"at once: training held for {at_once:.2f} s")
    print(f"beside: held for {held:.2f} s; written in {report.seconds:.2f} s")
    print(f"beside: {len(meanwhile)} steps meanwhile, each {statistics.median(meanwhile or alone):.2f} s")


def compare(root: Path) -> None:
    """Both hold the same weights: no step came between them."""
    name = "sft_train/mp_rank_00_model_states.pt"
    one, other = (torch.load(root / place / name, weights_only=False)["module"] for place in ("at-once", "beside"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


if __name__ == "__main__":
    main()
