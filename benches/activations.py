"""Memory and time of a forward and backward pass by what is kept, on the CPU: `benches/activations.py [--tokens 4096]`.

A Llama of random weights, 8 layers of 512, in float32; samples of 512 tokens in one row. Each way runs in a process of
its own, which reads its peak memory at the end; what it had before the pass is taken off. The gradients must be equal.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from sft_fast.train.attention import NAME, register
from sft_fast.train.memory import checkpoint_layers
from sft_fast.train.model import SFTModel
from tests.train_helpers import make_model

WAYS = ("none", "selective", "full")
SEGMENT = 512
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--way", choices=WAYS, help="used by itself")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.tokens)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--way", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    assert len({one["norm"] for one in found.values()}) == 1, found
    for way, one in found.items():
        print(
            f"{way:10} {one['mib']:7,.0f} MiB  {one['seconds']:6.2f} s, {one['seconds'] / found['none']['seconds']:.2f}"
        )


def measure(way: str, num_tokens: int) -> dict[str, Any]:
    """The second pass; the first one makes the gradients and whatever is made once."""
    register()
    hf = make_model(**SHAPE, num_key_value_heads=8, head_dim=64, initializer_range=0.02)
    hf.set_attn_implementation(NAME)
    checkpoint_layers(hf, way)
    model = SFTModel(hf).train()

    def run(num_segments: int) -> None:
        lengths = (SEGMENT,) * num_segments
        ids = torch.arange(SEGMENT * num_segments)[None] % 500
        places = torch.arange(SEGMENT).repeat(num_segments)[None]
        ends = torch.arange(num_segments + 1) * SEGMENT
        model(ids, places, ends, lengths, SEGMENT, torch.arange(64), ids[0, 1:65]).backward()

    run(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run(num_tokens // SEGMENT)
    seconds = time.perf_counter() - start
    norm = sum(
        float(parameter.grad.double().pow(2).sum()) for parameter in model.parameters() if parameter.grad is not None
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (peak - before) / 1024, "seconds": seconds, "norm": norm}


if __name__ == "__main__":
    main()
