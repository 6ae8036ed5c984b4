"""Errors for want of memory, of main memory or of a device."""

from __future__ import annotations

import sys

HINT = (
    "lower training.batch_size or data.max_length, set training.gradient_checkpointing = true, or hold the "
    "base in less (model.dtype = 'bfloat16', model.quantization); fedcustom estimate says what a recipe needs"
)
"""What a user can do."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left. PyTorch has a class for that on devices alone: of
    main memory it raises a ``RuntimeError``.
    """
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # which commands that need none do not import
    if torch is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
