"""A model that is not in use: its weights lie on the disk until somebody looks at them."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn


def park(model: nn.Module, folder: Path) -> None:
    """Put a model's parameters into a file that is mapped into memory, which the system reads page by page
    where they are used. What is written to them afterwards stays in memory. The file has no name any more,
    and its space is free again when the model is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "parked.safetensors"
    named = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    safetensors.torch.save_file(named, file)
    mapped = safetensors.torch.load_file(file)
    file.unlink()
    for name, parameter in model.named_parameters():
        parameter.data = mapped[name]
