"""Weights that loading initialised, saved with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.files import read_tensors, write_tensors
from ...models.load import Base

ADAPTER_FILE = "adapter_model.safetensors"


def add_initialised_weights(base: Base, model: Any, folder: Path) -> None:
    """Add to a saved adapter every weight that the base model's checkpoint lacks, such as the pooling layer
    of a masked language model. Whoever loads the checkpoint would draw them anew.

    PEFT puts every tensor of the file whose name is a weight's into the model, of the base too (it saves
    resized embeddings that way), so that ``PeftModel.from_pretrained`` alone restores them. The head's
    weights are there already.

    Args:
        base: The base model, with the report on its loading.
        model: The PEFT model around it.
        folder: Where the adapter was saved.
    """
    lacking = {name for name in base.loading.initialised if name.split(".")[0] not in base.head}
    if not lacking:
        return
    file = folder / ADAPTER_FILE
    tensors = read_tensors(file)
    for name, tensor in model.state_dict().items():
        if _original_name(model, name) in lacking and name not in tensors:
            tensors[name] = _in_float32(tensor)
    write_tensors(file, tensors, {"format": "pt"})


def _original_name(model: Any, name: str) -> str:
    """A weight's name before PEFT wrapped the model."""
    # Prompt learning leaves the layers as they are; the other methods stand between, as ``model``.
    prefix = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    return name.removeprefix(prefix).replace(".base_layer.", ".") if name.startswith(prefix) else ""


def _in_float32(tensor: Tensor) -> Tensor:
    """A copy that shares no memory, as safetensors asks for; frozen matrices may be stored in less."""
    tensor = tensor.detach().to("cpu", copy=True)
    return tensor.float() if tensor.is_floating_point() else tensor
