"""Environment of a run: versions, machine and memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "fedcustom", "torch", "transformers", "peft", "datasets", "flwr-datasets", "safetensors", "numpy",
    "scikit-learn", "sacrebleu", "rouge-score", "griffe", "pydantic",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Versions, processor, cores, threads, memory, accelerator and git commit (of this package's checkout,
    if any).
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


def restart_peak_memory() -> None:
    """Begin a new measurement of peak memory, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Most bytes of main memory that this process has held since :func:`restart_peak_memory`.

    Where the system cannot restart the measurement, since the process began.
    """
    if (found := kernel_says("/proc/self/status", "VmHWM:")) is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on a device now; 0 on a system that does not say."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return kernel_says("/proc/self/status", "VmRSS:") or 0


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a system that does not say, two gigabytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = kernel_says("/proc/meminfo", "MemAvailable:")
    return 2 * 2**30 if found is None else found


def kernel_says(path: str, key: str) -> int | None:
    """A number of bytes from a file in which Linux gives kilobytes."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__],
            cwd=folder,
            capture_output=True,
            timeout=10,
            check=False,
        )
        if tracked.returncode != 0:
            return None
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=False
        )
        return head.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
