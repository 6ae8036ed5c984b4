"""Checks of the machine: processor, GPU, memory, folders and environment variables."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..core.cache import cache_folder
from .finding import Finding

GIGABYTE = 1e9

LEAST_MEMORY = 2 * 10**9
"""Bytes below which the main example may not run: it takes about 0.9 GB."""

LEAST_DISK = 10**9

FAST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Instructions of a processor that matrix products use, the fastest first."""

NO_LIMIT = 2**60
"""Bytes of a control group's limit that stand for none."""


def check_processor() -> Iterator[Finding]:
    """Cores, and instructions for products in bfloat16."""
    flags = processor_flags()
    if not flags:
        yield Finding("processor", "ok", f"{platform.machine()}, instructions are not known")
    else:
        present = [name for name in FAST if name in flags]
        halves = "fast" if "amx_bf16" in flags or "avx512_bf16" in flags else "slow"
        text = f"{', '.join(present) or 'none of ' + ', '.join(FAST)}; bfloat16 is {halves}"
        yield Finding("processor", "ok", text)


def check_cores() -> Iterator[Finding]:
    """Cores that this process may use, and threads that torch takes."""
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    usable = allowed if quota is None else min(allowed, max(1, round(quota)))
    threads = torch.get_num_threads()
    said = f"{usable} to use, {threads} threads"
    if quota is not None:
        said += f" (the container is given {quota:g})"
    if threads > usable:
        yield Finding("cores", "warning", said, f"export OMP_NUM_THREADS={usable}")
    else:
        yield Finding("cores", "ok", said)


def check_gpu() -> Iterator[Finding]:
    """GPUs, their free memory, and whether torch was built for them."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            halves = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            name = torch.cuda.get_device_name(number)
            text = f"{name}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free, {halves}"
            yield Finding(f"gpu {number}", "ok", text)
    elif torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "Apple GPU (mps); quantisation is refused on it")
    elif (
        Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    ) and not torch.version.cuda:
        text = f"there is an NVIDIA driver, and torch {torch.__version__} is built for processors"
        yield Finding("gpu", "warning", text, "install the build of torch for CUDA (pytorch.org)")
    else:
        yield Finding("gpu", "absent", "none that torch can use; runs train on the processor")


def check_memory() -> Iterator[Finding]:
    """Main memory that is free, by the machine and by the limit of a container."""
    machine, limit = machine_memory(), container_memory()
    if machine is None and limit is None:
        yield Finding("memory", "ok", "the system does not say")
        return
    free = min(amount for amount in (machine, limit) if amount is not None)
    text = f"{free / GIGABYTE:.1f} GB free"
    if limit is not None and (machine is None or limit < machine):
        text += " by the container's limit"
    if free < LEAST_MEMORY:
        yield Finding("memory", "warning", text, "docs/memory.md: what takes less")
    else:
        yield Finding("memory", "ok", text)


def check_cache() -> Iterator[Finding]:
    """Whether the cache folder can be written, and has room."""
    folder = cache_folder()
    yield _writable("cache folder", folder, "FEDCUSTOM_CACHE names another folder")


def check_temporary() -> Iterator[Finding]:
    """The same of the folder of temporary files, in which exports are compared and token ids may lie."""
    yield _writable("temporary folder", Path(tempfile.gettempdir()), "TMPDIR names another folder")


def check_locks() -> Iterator[Finding]:
    """Whether the current folder's file system has locks, which keep two processes out of one run."""
    import fcntl

    with tempfile.TemporaryFile(dir=Path.cwd() if os.access(Path.cwd(), os.W_OK) else None) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = f"the current folder's file system has none ({error.strerror})"
            yield Finding("file locks", "warning", text, "keep runs on a local disk")
        else:
            yield Finding("file locks", "ok", "work in the current folder")


def check_variables() -> Iterator[Finding]:
    """Environment variables that change what runs do."""
    effects = {
        "HF_HUB_OFFLINE": "models and data of the hub are taken from the local copy only",
        "FEDCUSTOM_EXPORT_CHECK": "written models are not compared with the trained ones",
        "CUDA_VISIBLE_DEVICES": "some GPUs are hidden",
    }
    for name, effect in effects.items():
        value = os.environ.get(name)
        if value is None or (name == "HF_HUB_OFFLINE" and value.lower() in ("", "0", "false", "no", "off")):
            continue
        if name == "FEDCUSTOM_EXPORT_CHECK" and value != "off":
            continue
        yield Finding(name, "warning", f"is {value!r}: {effect}", f"unset {name}")


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler, which ``model.compile`` needs on a processor."""
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        yield Finding(
            "compiler", "absent", "no C++ compiler: model.compile needs one on a processor", "install g++"
        )
    else:
        yield Finding("compiler", "ok", Path(found).name)


def processor_flags() -> set[str]:
    """Instructions of the processor as Linux names them; empty on other systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def machine_memory() -> int | None:
    """Bytes of memory that the machine has free; None where it does not say (Linux does)."""
    from ..core.environment import kernel_says

    return kernel_says("/proc/meminfo", "MemAvailable:")


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group of this process has left of its limit; None where there is no limit.

    Args:
        root: where the control groups' files are: of version 2, else of version 1.
    """
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        most, held = _number(limit), _number(used)
        if most is not None and most < NO_LIMIT:
            return max(0, most - (held or 0))
    return None


def processor_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors that the control group of this process is given; None where there is no limit."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        most, period_ = _number(root / "cpu/cpu.cfs_quota_us"), _number(root / "cpu/cpu.cfs_period_us")
        return most / period_ if most is not None and most > 0 and period_ else None
    return None if quota == "max" else int(quota) / int(period)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _writable(check: str, folder: Path, hint: str) -> Finding:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(check, "failed", f"{folder} cannot be written: {error.strerror}", hint)
    text = f"{folder}, {free / GIGABYTE:.1f} GB free"
    return Finding(check, "ok", text) if free >= LEAST_DISK else Finding(check, "warning", text, hint)
