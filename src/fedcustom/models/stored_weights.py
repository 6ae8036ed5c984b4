"""Loading of weights in the precision in which a checkpoint stores them.

``transformers`` maps a safetensors file into memory and reads a weight when it is used, shard by shard, as
long as the dtype stays the same. In another dtype a model is held twice for a while: as it is stored and as
it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.files import read_json
from .memory_mapping import leave_memory

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of 16 bits by their names in safetensors' files."""

FILES = ("model.safetensors", "model.safetensors.index.json")


def stored_half(path: str, revision: str | None) -> torch.dtype | None:
    """The one dtype of 16 bits in which a checkpoint stores all of its numbers; None where it stores others
    too, or is no safetensors file.

    Args:
        path: Folder or hub id.
        revision: Branch, tag or commit of a hub model.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def found(name: str) -> Any:
        return cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip

    single, index = found(FILES[0]), None
    if single is None:
        index = found(FILES[1])
    if index is not None:
        names = sorted(set(read_json(Path(index))["weight_map"].values()))
        files = [found(name) for name in names]
    else:
        files = [single]
    kinds: set[str] = set()
    for file in files:
        if file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            kinds |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return HALVES.get(kinds.pop()) if len(kinds) == 1 else None


def widen(model: Any, *, matrices: bool) -> None:
    """Turn a model's weights of 16 bits into float32, one after the other, in place; without ``matrices``,
    those of one dimension alone.
    """
    for parameter in model.parameters():
        if parameter.dtype in HALVES.values() and (matrices or parameter.dim() < 2):
            stored = parameter.data
            parameter.data = stored.float()
            leave_memory({"": stored})
    for buffer in model.buffers():
        if buffer.dtype in HALVES.values():
            buffer.data = buffer.data.float()
    for module in model.modules():
        configuration: Any = getattr(module, "config", None)
        if getattr(configuration, "dtype", None) in HALVES.values():
            configuration.dtype = torch.float32


def settle(model: Any, precision: str) -> None:
    """Decide on the matrices of 16 bits that a model still has: with ``precision`` bfloat16 they stay as they
    are stored, and are used in float32 outside of autocast (:func:`used_in_float32`); else, and where the
    model's code does not allow that, they become float32.
    """
    if not holds_halves(model.parameters()):
        return
    if precision == "bfloat16":
        used_in_float32(model)
        if passes_in_float32(model):
            return
    widen(model, matrices=True)


def used_in_float32(model: nn.Module) -> None:
    """Let modules that hold matrices of 16 bits use them in float32 outside of autocast, so that a pass there
    gives what it gives with a model in float32.
    """
    for module in model.modules():
        if any(p is not None and p.dtype in HALVES.values() for p in module._parameters.values()):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


def _widen(module: nn.Module, arguments: Any) -> None:
    halves = {
        name: p for name, p in module._parameters.items() if p is not None and p.dtype in HALVES.values()
    }
    if not halves or torch.is_autocast_enabled(next(iter(halves.values())).device.type):
        return
    module.__dict__["_stored"] = halves
    for name, parameter in halves.items():
        module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)


def _narrow(module: nn.Module, arguments: Any, result: Any) -> None:
    module._parameters.update(module.__dict__.pop("_stored", {}))


def holds_halves(tensors: Iterable[Tensor]) -> bool:
    """Whether there are tensors of 16 bits among these."""
    return any(tensor.dtype in HALVES.values() for tensor in tensors)


@torch.no_grad()
def passes_in_float32(model: Any) -> bool:
    """Whether a pass outside of autocast works; not where code reads weights of 16 bits past the modules that
    hold them.
    """
    ids = torch.arange(1, 4, device=next(model.parameters()).device)[None]
    other = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    try:
        model(input_ids=ids, **other)
    except RuntimeError:
        return False
    return True
