"""`sft-fast doctor`: what this machine can do, what is missing, and the command that would install it.

Nothing heavy is imported: versions are read from what pip wrote down, GPUs from their driver.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sft_fast
from sft_fast import _core
from sft_fast.console import count, size

# `ok`: works. `note`: works, but something is worth knowing. `missing`: something optional is not there.
# `problem`: something does not work that is needed.
State = Literal["ok", "note", "missing", "problem"]

# Below this, Ray's object store and NCCL fall back to slower ways, or fail.
MIN_SHARED_MEMORY_BYTES = 1_000_000_000
MIN_FREE_DISK_BYTES = 10_000_000_000
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# What each extra is for; `docs`, `demo` and `dev` are for contributors.
EXTRAS = {
    "train": "sft-fast train and export",
    "arrow": "Arrow tables",
    "parquet": "Parquet files",
    "report": "sft-fast inspect --html",
    "tracking": "Weights & Biases",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    section: str
    name: str
    value: str
    state: State = "ok"
    hint: str | None = None
    """What to do about it."""


def examine(cache_dir: str, *, for_training: bool = False) -> list[Check]:
    """Looks at the machine.

    Args:
        cache_dir: where data sets would be kept; it need not exist.
        for_training: whether what only training needs is a problem where it is missing.
    """
    checks = [
        *_program(),
        *_processor(),
        *_memory(),
        *_gpus(),
        *_packages(for_training),
        *_file_system(cache_dir),
    ]
    return [check for check in checks if check.value]


def _program() -> Iterator[Check]:
    yield Check("program", "sft-fast", f"{sft_fast.__version__}, data sets of format {_core.FORMAT_VERSION}")
    yield Check("program", "python", f"{platform.python_version()}, {sys.executable}")
    libc, version = platform.libc_ver()
    yield Check("program", "system", f"{platform.system()} {platform.release()}, {libc} {version}".rstrip(", "))


def _processor() -> Iterator[Check]:
    yield Check("processor", "model", _cpu_model())
    features = _core.cpu_features()
    found = ", ".join(name for name, is_there in features if is_there) or "none of these"
    absent = ", ".join(name for name, is_there in features if not is_there)
    yield Check("processor", "features", found + (f" (not: {absent})" if absent else ""))
    level = _core.engine_level()
    slow = "the tokenizer engine works byte by byte here: slower, with the same tokens"
    yield Check("processor", "engine", level, "note" if level == "plain" else "ok", slow if level == "plain" else None)
    usable, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _cpu_quota()
    value = count(all_cores)
    if usable < all_cores:
        value += f", {count(usable)} of them for this process"
    if quota is not None and quota < usable:
        value += f"; a quota allows the time of {quota:.1f}"
        yield Check("processor", "cores", value, "note", f"--num-threads {max(1, round(quota))} suits the quota")
    else:
        yield Check("processor", "cores", value)


def _cpu_model() -> str:
    text = _read("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _cpu_quota() -> float | None:
    """Cores that the control group of this process may use, if it has a limit."""
    parts = _read("/sys/fs/cgroup/cpu.max").split()
    if len(parts) == 2 and parts[0] != "max":
        return int(parts[0]) / int(parts[1])
    return None


def _memory() -> Iterator[Check]:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    if "MemTotal" in fields and "MemAvailable" in fields:
        total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
        limit = _read("/sys/fs/cgroup/memory.max").strip()
        limited = f"; a limit of {size(int(limit))} for this process" if limit.isdecimal() else ""
        yield Check("memory", "memory", f"{size(total)}, {size(available)} free{limited}")
    try:
        num_bytes = shutil.disk_usage("/dev/shm").total
    except OSError:
        yield Check("memory", "shared memory", "no /dev/shm", "note", "Ray then keeps its objects on the disk")
        return
    is_small = num_bytes < MIN_SHARED_MEMORY_BYTES
    hint = "training on several GPUs wants more: docker run --shm-size=8g, or --ipc=host" if is_small else None
    yield Check("memory", "shared memory", size(num_bytes), "note" if is_small else "ok", hint)


def _gpus() -> Iterator[Check]:
    gpus = _nvidia_gpus()
    for number, gpu in enumerate(gpus):
        yield Check("gpu", f"gpu {number}", gpu)
    if not gpus:
        value = "none found" if shutil.which("nvidia-smi") is None else "nvidia-smi names none"
        yield Check("gpu", "gpus", value, "note", "num_gpus_per_node=0 trains on the CPU")
    cuda = _torch_cuda()
    if cuda is not None:
        is_wrong = bool(gpus) and cuda == "CPU only"
        hint = "install a build for CUDA: https://pytorch.org/get-started/locally" if is_wrong else None
        yield Check("gpu", "torch is built for", cuda, "problem" if is_wrong else "ok", hint)


def _nvidia_gpus() -> list[str]:
    """Name, memory and driver of each GPU, as its driver says."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.split(", ") for line in result.stdout.splitlines() if line.count(", ") == 2]
    return [f"{name}, {memory}, driver {driver}" for name, memory, driver in lines]


def _torch_cuda() -> str | None:
    """What torch is built for, read from its file of versions: importing it takes seconds."""
    try:
        found = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        return None
    text = _read(os.path.join(next(iter(found.submodule_search_locations)), "version.py"))
    match = re.search(r"^cuda\b[^=]*=\s*(.*)$", text, re.MULTILINE)
    version = match[1].strip("'\" ") if match else "None"
    return "CPU only" if version == "None" else f"CUDA {version}"


def _packages(for_training: bool) -> Iterator[Check]:
    """The packages of the base and of each extra: their versions, and what is missing or too old."""
    try:
        requirements = importlib.metadata.requires("sft-fast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "sft-fast", "not installed by pip", "note", "what it needs cannot be told")
        return
    for requirement in requirements:
        match = re.match(r"([\w.-]+)[^;]*?>=\s*([\w.]+)[^;]*(?:;.*extra\s*==\s*['\"](\w+)['\"])?", requirement)
        if match is None:
            continue
        name, lowest, extra = match.groups()
        if extra is not None and extra not in EXTRAS:
            continue
        is_needed = extra is None or (extra == "train" and for_training)
        section = "packages" if extra is None else f"packages for {EXTRAS[extra]}"
        install = "pip install --upgrade sft-fast" if extra is None else f"pip install 'sft-fast[{extra}]'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(section, name, "not installed", "problem" if is_needed else "missing", install)
            continue
        if _numbers(version) < _numbers(lowest):
            value = f"{version}, older than {lowest}"
            yield Check(section, name, value, "problem" if is_needed else "missing", f"{install} --upgrade")
        else:
            yield Check(section, name, version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _file_system(cache_dir: str) -> Iterator[Check]:
    """What data sets need of the file system that they would be on."""
    directory = Path(cache_dir).absolute()
    while not directory.is_dir():
        directory = directory.parent
    place = f"{cache_dir}, {_file_system_type(directory)}"
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".sft-fast-doctor-", dir=directory)
    except OSError as error:
        hint = "name another place: data_cache_dir=DIR"
        yield Check("data cache", "directory", f"{place}: cannot write, {error.strerror}", "problem", hint)
        return
    with scratch as path:
        yield Check("data cache", "directory", place)
        has_locks = _has_locks(path)
        hint = "two runs at once may make the same data set twice; give each its own cache"
        state: State = "ok" if has_locks else "problem"
        yield Check("data cache", "file locks", "yes" if has_locks else "no", state, None if has_locks else hint)
        can_exchange = _can_exchange(path)
        hint = "a data set cannot be replaced here: remove the old one first"
        state = "ok" if can_exchange else "note"
        yield Check("data cache", "exchange", "yes" if can_exchange else "no", state, None if can_exchange else hint)
    free = shutil.disk_usage(directory).free
    is_little = free < MIN_FREE_DISK_BYTES
    hint = "sft-fast cache prune frees space; a token takes 2.2 or 4.2 bytes"
    yield Check("data cache", "free", size(free), "note" if is_little else "ok", hint if is_little else None)


def _file_system_type(directory: Path) -> str:
    """The kind of file system that a directory is on: that of the longest mount point above it."""
    kind, longest = "unknown file system", 0
    for line in _read("/proc/self/mounts").splitlines():
        mount, name = line.split()[1:3]
        mount = mount.replace("\\040", " ")
        if len(mount) >= longest and (directory == Path(mount) or Path(mount) in directory.parents):
            kind, longest = name, len(mount)
    return kind


def _has_locks(directory: str) -> bool:
    """Whether an exclusive lock keeps others out: where it does not, it is none."""
    path = os.path.join(directory, "lock")
    with open(path, "w") as holder, open(path) as other:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK
        return False


def _can_exchange(directory: str) -> bool:
    """Whether two directories can change names in one step."""
    names = [os.path.join(directory, name) for name in ("one", "two")]
    for name in names:
        os.mkdir(name)
    Path(names[0], "mark").touch()
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:  # an old C library
        return False
    one, two = map(os.fsencode, names)
    return rename(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE) == 0 and Path(names[1], "mark").exists()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
