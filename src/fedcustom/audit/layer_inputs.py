"""Inputs of a layer's attention: which trained matrices take them, and what they are for given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..methods.tuning.technique import TrainableModel
from ..models.frozen_layers import transformer_layers


class _Passed(Exception):
    """The pass has gone beyond what is looked at."""


@dataclass(frozen=True)
class LayerInputs:
    """What goes into the attention of one layer, and the trained matrices that take it: those of query, key
    and value, one for all three, or their first LoRA factors.

    Attributes:
        model: The model that is trained, as it is when it is asked.
        layer: The layer.
        matrices: The names by which the matrices travel, each with whether its rows are combinations of the
            inputs, as of (out, in); else its columns are.
    """

    model: Any
    layer: nn.Module
    matrices: Mapping[str, bool]

    @classmethod
    def of(cls, trainable: TrainableModel, number: int) -> LayerInputs | None:
        """Those of a layer, counted from 0; None where the model has two stacks of layers or none, too few
        layers, or trains no such matrix.
        """
        found = transformer_layers(trainable.model)
        if found is None or number >= len(found[1]):
            return None
        names = {id(parameter): name for name, parameter in trainable.parameters.items()}
        layer = found[1][number]
        _, modules = _pass(trainable.model, layer, torch.zeros(1, 2, dtype=torch.long))
        matrices = {
            names[id(module.weight)]: not isinstance(module, Conv1D)
            for module in modules
            if id(module.weight) in names
        }
        return cls(trainable.model, layer, matrices) if matrices else None

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrices among these tensors, with what are combinations of inputs as rows, (rows, width), in
        double precision.
        """
        there = {name: tensors[name].double() for name in self.matrices if name in tensors}
        turned = [tensor if self.matrices[name] else tensor.T for name, tensor in there.items()]
        return torch.cat(turned) if turned else torch.zeros(0, 1, dtype=torch.float64)

    def of_texts(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """The inputs for texts of one length, (texts, tokens, width)."""
        states, _ = _pass(self.model, self.layer, torch.tensor(ids, dtype=torch.long))
        return states

    def of_tokens(self, tokens: Sequence[int], length: int) -> Tensor:
        """The inputs for each of these tokens at each position, (tokens, length, width). They are what texts
        have in the first layer only, up to which nothing passes from one position to another.
        """
        states, _ = _pass(self.model, self.layer, torch.tensor(tokens)[:, None].expand(-1, length))
        return states


@torch.no_grad()
def _pass(model: Any, layer: nn.Module, ids: Tensor) -> tuple[Tensor, list[Any]]:
    """The input of a layer's first matrix, (texts, tokens, width), and the matrices that take it too."""
    model.eval()
    ids = ids.to(next(model.parameters()).device)
    with _watching(layer) as (seen, modules), suppress(_Passed):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return (seen[0].float().cpu() if seen else torch.zeros(*ids.shape, 0)), modules


@contextmanager
def _watching(layer: nn.Module) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """Meanwhile, note the input of the layer's first matrix and which others take it, and stop the pass at
    the first matrix that takes something else than that or what one of these gave.
    """
    seen: list[Tensor] = []
    modules: list[Any] = []
    given: list[Tensor] = []

    def enter(module: Any, arguments: tuple[Any, ...]) -> None:
        if not arguments:
            return
        if not seen:
            seen.append(arguments[0])
        if arguments[0] is seen[0]:
            modules.append(module)
        elif not any(arguments[0] is states for states in given):
            raise _Passed

    def leave(module: Any, arguments: Any, result: Tensor) -> None:
        given.append(result)  # LoRA's second factor takes what its first one gives

    handles: list[Any] = []
    for module in layer.modules():
        if isinstance(module, nn.Linear | Conv1D):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield seen, modules
    finally:
        for handle in handles:
            handle.remove()
