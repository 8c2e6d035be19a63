"""Checks on this machine's GPU what the tests can only check without one, and measures; `make gpu-check` runs it.

It drives one rank (`SFTWorker`) in this process: no Ray, no network, no files of a model; where there are two GPUs, the
last check starts two ranks under Ray. Each line says what was
checked, whether it holds, and the numbers. Exit status: 0 if all holds, 1 if something does not, 3 without a GPU.

    python scripts/gpu_check.py [--device cpu] [--only NAME] [--skip NAME]

With `--device cpu` the same checks run small on the CPU, which says that the script works and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NO_GPU = 3
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", metavar="NAME", help="run the checks whose name has this in it")
    parser.add_argument("--skip", metavar="NAME", action="append", default=[], help="not the check of this name")
    arguments = parser.parse_args()

    import torch
    from transformers.utils import logging as transformers_logging

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU on this machine; nothing was checked")
        return NO_GPU
    transformers_logging.disable_progress_bar()
    # DeepSpeed reads it when it is imported.
    os.environ["DS_ACCELERATOR"] = arguments.device
    sys.path.insert(0, str(ROOT))
    name = torch.cuda.get_device_name(0) if arguments.device == "cuda" else "the CPU"
    print(f"gpu-check on {name}, torch {torch.__version__}")
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        for check in CHECKS:
            if (arguments.only and arguments.only not in check.__name__) or check.__name__ in arguments.skip:
                continue
            try:
                for holds, line in check(arguments.device, Path(directory, check.__name__)):
                    print(f"{'ok    ' if holds else 'FAILED'} {check.__name__}: {line}", flush=True)
                    if not holds:
                        failed.append(check.__name__)
            except Exception as error:
                print(f"FAILED {check.__name__}: {type(error).__name__}: {error}", flush=True)
                failed.append(check.__name__)
    print("gpu-check: all holds" if not failed else f"gpu-check: does not hold: {', '.join(sorted(set(failed)))}")
    return 1 if failed else 0


# What a check gives for each thing it looks at: whether it holds, and a line with the numbers.
Findings = Iterator[tuple[bool, str]]


def kernels(device: str, _directory: Path) -> Findings:
    """The kernel over all samples of a pack against torch's own on each sample, forward and backward."""
    import torch

    from sft_fast.train.attention import kernel_name, per_sample_attention

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = (700, 1, 300, 1047) if device == "cuda" else (70, 1, 30)
    boundaries = [sum(lengths[:k]) for k in range(len(lengths) + 1)]
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    for head_dim, window in ((64, None), (128, None), (128, 128), (256, None)):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(1, heads, boundaries[-1], head_dim) for heads in (8, 2, 2)]
        inputs = [torch.randn(s, generator=generator, device=device, dtype=dtype).requires_grad_() for s in shapes]
        results = []
        for implementation in ("auto", "sdpa"):
            output, _ = per_sample_attention(
                torch.nn.Module(),
                *inputs,
                None,
                sliding_window=window,
                cu_seqlens=cu_seqlens,
                max_seqlen=max(lengths),
                segment_lengths=lengths,
                implementation=implementation,
            )
            weights = torch.linspace(-1, 1, output.numel(), device=device, dtype=dtype).view_as(output)
            results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
        differences = [
            ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item()
            for mine, theirs in zip(*results, strict=True)
        ]
        yield (
            max(differences) < 2e-2,
            f"{kernel_name(inputs[0])}, heads of {head_dim}, window {window}: output differs by {differences[0]:.1e}, "
            f"gradients by at most {max(differences[1:]):.1e}",
        )


def chunked_loss(device: str, _directory: Path) -> Findings:
    """Memory and time of the chunked cross-entropy against all logits at once."""
    import torch

    from sft_fast.train.loss import cross_entropy_sum

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows, size, vocabulary = (8192, 2048, 128_256) if device == "cuda" else (256, 64, 4000)
    hidden = torch.randn(rows, size, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, size, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def chunked() -> torch.Tensor:
        return cross_entropy_sum(hidden, weight, targets)

    def whole() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    measured = []
    for function in (chunked, whole):
        torch.autograd.grad(function(), (hidden, weight))
        before, start = _memory(device, reset=True), time.perf_counter()
        loss = function()
        gradients = torch.autograd.grad(loss, (hidden, weight))
        _wait(device)
        measured.append((loss.item(), time.perf_counter() - start, _memory(device) - before, gradients))
    (mine, my_seconds, my_bytes, my_gradients), (theirs, their_seconds, their_bytes, their_gradients) = measured
    norms = [
        ((one.float() - other.float()).norm() / other.float().norm()).item()
        for one, other in zip(my_gradients, their_gradients, strict=True)
    ]
    yield (
        abs(mine / theirs - 1) < 1e-3 and max(norms) < 2e-2 and (device == "cpu" or my_bytes < their_bytes),
        f"{rows} label tokens, {vocabulary} ids: {my_bytes / 2**20:.0f} MiB and {my_seconds * 1e3:.0f} ms in chunks, "
        f"{their_bytes / 2**20:.0f} MiB and {their_seconds * 1e3:.0f} ms whole; gradients differ by {max(norms):.1e}",
    )


def parity(device: str, directory: Path) -> Findings:
    """Loss and gradient norm of each ZeRO stage against a plain loop over single samples, packed and not."""
    from tests.train_helpers import Workspace, plain_loop, run_worker

    workspace = Workspace.create(directory)
    num_steps = 4
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 3e-2)):
        for stage in (1, 2, 3):
            for packed in (True, False):
                config = workspace.config(stage=stage, packed=packed, model={"dtype": dtype})
                expected = plain_loop(config, num_steps, device)
                difference = _difference(run_worker(config, num_steps, device), expected)
                yield (
                    difference < tolerance,
                    f"{dtype}, ZeRO-{stage}, {'packed' if packed else 'single'}: loss and gradient norm of {num_steps} "
                    f"steps differ by at most {difference:.1e}",
                )


def masters(device: str, directory: Path) -> Findings:
    """Updates too small for bfloat16 add up in float32 masters until they move the weight."""
    import torch

    from tests.train_helpers import Workspace, start_worker

    workspace = Workspace.create(directory)
    training = {"learning_rate": 1e-4, "weight_decay": 0.0, "num_train_epochs": 8}
    config = workspace.config(model={"dtype": "bf16"}, training=training)
    worker = start_worker(config, device=device)
    weight = worker._strategy.model.hf_model.lm_head.weight
    before = weight.detach().clone()
    for step in range(20):
        worker.train_step(step)
    is_large = before.abs() >= 0.25
    moved = (weight != before)[is_large].float().mean().item()
    dtype = weight.dtype
    worker.close()
    yield dtype == torch.bfloat16 and moved > 0.3, f"{moved:.0%} of the large bfloat16 weights moved in 20 small steps"


def resume(device: str, directory: Path) -> Findings:
    """Steps after a checkpoint are those of a run that was never stopped, to the last bit."""
    from tests.test_train_worker import save
    from tests.train_helpers import Workspace, start_worker

    workspace = Workspace.create(directory)
    for stage in (1, 2, 3):
        config = workspace.config(stage=stage, model={"dtype": "bf16"}, output_dir=str(directory / f"out{stage}"))
        worker = start_worker(config, device=device)
        worker.train_step(0)
        checkpoint = save(worker, config, 1)
        straight = [worker.train_step(step) for step in (1, 2)]
        worker.close()
        worker = start_worker(config, checkpoint, device=device)
        resumed = [worker.train_step(step) for step in (1, 2)]
        worker.close()
        pairs = [[(report.loss, report.grad_norm) for report in reports] for reports in (straight, resumed)]
        yield pairs[0] == pairs[1], f"ZeRO-{stage}: losses and norms after a resumption are the same to the last bit"


def memory(device: str, directory: Path) -> Findings:
    """What is kept for the backward pass, and where: the steps of a plain loop, with time and memory."""
    yield from _against_a_plain_loop(
        device,
        directory,
        ("all kept", 1, {"gradient_checkpointing": "none"}),
        ("selective checkpointing", 3, {"gradient_checkpointing": "selective"}),
        ("offloaded activations", 1, {"gradient_checkpointing": "full", "offload_activations": True}),
    )


def compiled(device: str, directory: Path) -> Findings:
    """Compiled layers: the steps of a plain loop."""
    yield from _against_a_plain_loop(device, directory, ("compiled layers", 2, {"compile": True}))


def _against_a_plain_loop(device: str, directory: Path, *kinds: tuple[str, int, dict[str, Any]]) -> Findings:
    """Steps in float32 with other settings of the model: their names, the stage and the settings of each."""
    from tests.train_helpers import Workspace, plain_loop, run_worker

    workspace = Workspace.create(directory)
    num_steps = 4
    expected = plain_loop(workspace.config(), num_steps, device)
    for name, stage, model in kinds:
        start = time.perf_counter()
        reports = run_worker(workspace.config(stage=stage, model=model), num_steps, device)
        seconds = time.perf_counter() - start
        difference = _difference(reports, expected)
        yield (
            difference < 1e-4,
            f"{name}, ZeRO-{stage}, fp32: loss and gradient norm of {num_steps} steps differ by at most "
            f"{difference:.1e}; {seconds:.1f} s with the start, the last step {reports[-1].step_seconds * 1e3:.0f} ms, "
            f"{reports[-1].peak_memory_bytes / 2**20:.0f} MiB",
        )


def quantised(device: str, directory: Path) -> Findings:
    """Adapters over weights in 4 and 8 bits: they learn, and lose little against adapters over the whole weights."""
    import importlib.util

    from tests.train_helpers import Workspace, run_worker

    if importlib.util.find_spec("bitsandbytes") is None:
        yield True, "not checked: bitsandbytes is not installed"
        return
    # Wide enough for blocks of 64 weights.
    workspace = Workspace.create(
        directory, hidden_size=64, intermediate_size=128, head_dim=16, initializer_range=0.1, num_records=24
    )
    lora: dict[str, Any] = {"lora_target": "all-linear", "lora_rank": 4, "dtype": "bf16"}
    whole = run_worker(workspace.config(model=lora), 4, device)
    for kind in ("nf4", "int8"):
        reports = run_worker(workspace.config(model={**lora, "quantization": kind}), 4, device)
        difference = max(abs(mine.loss / theirs.loss - 1) for mine, theirs in zip(reports, whole, strict=True))
        yield (
            difference < 0.05 and reports[-1].loss < reports[0].loss,
            f"{kind}: losses differ from those over bf16 weights by at most {difference:.1e}; a step "
            f"{reports[-1].step_seconds * 1e3:.0f} ms, {whole[-1].step_seconds * 1e3:.0f} ms over bf16",
        )


def background_save(device: str, directory: Path) -> Findings:
    """A checkpoint that is copied off the device and written while steps go on is the state before them."""
    from sft_fast.train.checkpoint import commit, staging_directory
    from tests.test_train_worker import state_of
    from tests.train_helpers import Workspace, start_worker

    workspace = Workspace.create(directory)
    config = workspace.config(stage=2, model={"dtype": "bf16"}, output_dir=str(directory / "out"))
    worker = start_worker(config, device=device)
    worker.train_step(0)
    staging = staging_directory(config.output_dir, 1)
    held = worker.do_checkpoint(str(staging), True)
    straight = [worker.train_step(step) for step in (1, 2)]
    written = worker.finish_checkpoint(True)
    worker.close()
    worker = start_worker(config, commit(staging, state_of(config, 1)).path, device=device)
    resumed = [worker.train_step(step) for step in (1, 2)]
    worker.close()
    pairs = [[(report.loss, report.grad_norm) for report in reports] for reports in (straight, resumed)]
    yield (
        pairs[0] == pairs[1] and written is not None,
        f"resumed to the last bit from a checkpoint written beside two steps: held for {held * 1e3:.0f} ms, written in "
        f"{0 if written is None else written.seconds * 1e3:.0f} ms",
    )


def ranks(device: str, directory: Path) -> Findings:
    """Split weights (AutoTP), split rows (Ulysses) and FSDP2 on two devices, or two processes of the CPU, under Ray."""
    import torch

    from sft_fast.config import StrategyArguments
    from sft_fast.train.cluster import Cluster
    from tests.train_helpers import Workspace, dataset_of, plain_loop, ray_here

    if device == "cuda" and torch.cuda.device_count() < 2:
        yield True, "not checked: it takes two GPUs"
        return
    num_gpus = 2 if device == "cuda" else 0
    workspace = Workspace.create(directory)
    num_steps = 3
    expected = plain_loop(workspace.config(rows=1, micro_batches=2), num_steps, device)
    with ray_here(num_cpus=2):
        options: dict[str, Any] = {"ranks": 2, "rows": 1, "num_gpus_per_node": num_gpus}
        cluster = Cluster(workspace.config(**options))
        for name, micro_batches, strategy in (
            ("AutoTP, ZeRO-1", 2, {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}}),
            ("Ulysses, ZeRO-3", 2, {"sequence_parallel_size": 2, "zero_optimization": {"stage": 3}}),
            ("FSDP2", 1, None),
        ):
            arguments = (
                StrategyArguments(strategy_name="fsdp2_train")
                if strategy is None
                else StrategyArguments(strategy_config=strategy)
            )
            config = workspace.config(**options, micro_batches=micro_batches, strategy=arguments)
            cluster.initialize(config, dataset_of(config).path)
            reports = [cluster.submit("train_step", step).result() for step in range(num_steps)]
            found = [(sum(report.loss for report in both), both[0].grad_norm) for both in reports]
            difference = _largest(found, expected)
            yield (
                difference < 1e-4,
                f"{name} on two ranks: loss and gradient norm of {num_steps} steps differ by at most {difference:.1e}; "
                f"a step {max(report.step_seconds for report in reports[-1]) * 1e3:.0f} ms",
            )
        cluster.shutdown()


def _difference(reports: list[Any], expected: list[tuple[float, float]]) -> float:
    return _largest([(report.loss, report.grad_norm) for report in reports], expected)


def _largest(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """The largest relative difference between losses and norms."""
    return max(
        abs(mine / theirs - 1)
        for one, other in zip(found, expected, strict=True)
        for mine, theirs in zip(one, other, strict=True)
    )


def speed(device: str, directory: Path) -> Findings:
    """Tokens a second, MFU, memory and the parts of a step, of a model in the shape of Qwen2.5-0.5B."""
    from tests.train_helpers import Workspace, make_model_dir, start_worker

    is_gpu = device == "cuda"
    shape: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
    if is_gpu:
        shape |= {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        shape |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151_936, "initializer_range": 0.02}
    directory.mkdir()
    model_dir = make_model_dir(directory / "model", "qwen2", **shape)
    records = write_long_records(directory / "r.jsonl", 4000 if is_gpu else 60)
    workspace = Workspace(directory, model_dir, records)
    rows, num_steps = (4, 12) if is_gpu else (1, 3)
    for checkpointing in (False, True):
        config = workspace.config(
            rows=rows,
            micro_batches=2,
            model={"dtype": "bf16", "disable_gradient_checkpointing": not checkpointing},
            sequence_length=4096 if is_gpu else 512,
            too_long="truncate",
            training={"learning_rate": 1e-5},
        )
        worker = start_worker(config, device=device)
        reports = [worker.train_step(step) for step in range(num_steps)][2:]
        worker.close()
        seconds = sum(report.step_seconds for report in reports)
        peak = reports[0].peak_tflops
        mfu = "unknown" if peak is None else f"{sum(report.flops for report in reports) / seconds / peak / 1e12:.1%}"
        parts = ", ".join(
            f"{part} {sum(getattr(report, f'{part}_seconds') for report in reports) / seconds:.0%}"
            for part in ("data_wait", "forward", "backward", "optimizer")
        )
        yield (
            all(report.loss < 50 for report in reports),
            f"{'with' if checkpointing else 'without'} gradient checkpointing: "
            f"{sum(report.num_tokens for report in reports) / seconds:,.0f} tokens/s, MFU {mfu}, "
            f"{max(report.peak_memory_bytes for report in reports) / 2**30:.1f} GiB; of the time {parts}",
        )


def write_long_records(path: Path, num_records: int) -> Path:
    """Records whose lengths are spread as those of instructions are: many short, few long."""
    import json

    choose = random.Random(0)

    def words() -> str:
        count = min(3000, int(choose.lognormvariate(4.5, 1.0)) + 1)
        return " ".join(choose.choices("the of and Paris sea blue wide France still capital".split(), k=count))

    lines = (json.dumps({"instruction": words(), "output": words()}) + "\n" for _ in range(num_records))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str, *, reset: bool = False) -> int:
    """Peak bytes of the GPU since the last reset, or those in use with it; 0 on the CPU, where nobody counts."""
    import torch

    if device == "cpu":
        return 0
    _wait(device)
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


CHECKS: tuple[Callable[[str, Path], Findings], ...] = (
    *(kernels, chunked_loss, parity, memory, compiled, quantised, masters, resume, background_save),
    *(speed, ranks),
)

if __name__ == "__main__":
    sys.exit(main())
