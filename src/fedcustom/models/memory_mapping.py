"""Parked tensors: unused tensors memory-mapped from disk."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.tensors import Tensors

MADV_PAGEOUT = 21
"""Linux 5.4 and newer: pages that are on the disk too leave memory, others stay."""


def parked(tensors: Mapping[str, Tensor], folder: Path) -> Tensors:
    """The tensors out of a file that is mapped into memory, which the system reads page by page where they
    are used. What is written to them afterwards stays in memory. The file has no name any more, and its
    space is free again when the last of them is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parked.safetensors"
    safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, file)
    mapped = safetensors.torch.load_file(file)
    file.unlink()
    return mapped


def leave_memory(tensors: Mapping[str, Tensor]) -> None:
    """Let tensors that are mapped from a file, and were just used, take no memory until they are used again;
    where the system cannot, they stay.
    """
    if sys.platform != "linux":
        return
    storages = {tensor.untyped_storage() for tensor in tensors.values() if tensor.device.type == "cpu"}
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for start, size in {(storage.data_ptr(), storage.nbytes()) for storage in storages}:
            first = start - start % mmap.PAGESIZE
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), MADV_PAGEOUT)


def give_back() -> None:
    """Give the system what was freed in between of what is still used, where it can be told to (glibc)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def park(model: nn.Module, folder: Path) -> None:
    """Put a model's parameters, and the bytes of quantised ones, where they take no memory until they are
    used (:func:`parked`).
    """
    packed = {name: b for name, b in model.named_buffers() if b.dtype in (torch.int8, torch.uint8)}
    weights = {**dict(model.named_parameters()), **packed}
    mapped = parked(weights, folder)
    for name, tensor in weights.items():
        tensor.data = mapped[name]
