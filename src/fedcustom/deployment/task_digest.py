"""The digest of a task as it travels, which server and sites compute alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.tensors import DTYPE_NAMES


def task_digest(
    kind: str, values: Mapping[str, Any], layout: Any, round_number: int, tensors: Mapping[str, Tensor]
) -> bytes:
    """SHA-256 of a task's message: its kind, values and round, and its tensors as they travelled."""
    head = json.dumps([kind, values, layout, round_number], sort_keys=True)
    hashed = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        form = [name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)]
        hashed.update(json.dumps(form).encode())
        numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        hashed.update(numbers)
    return hashed.digest()
