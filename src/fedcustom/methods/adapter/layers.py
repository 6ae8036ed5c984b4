"""Matrices with extra hidden units beside their frozen ones, in ``nn.Linear`` and in GPT-2's ``Conv1D``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Matrix = nn.Linear | Conv1D


class Widened(nn.Module):
    """A frozen matrix, ``base``, and the extra one, ``adapter``, that is trained."""

    def __init__(self, base: Matrix, adapter: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter.to(base.weight.device)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, whose dtype T5's code asks for."""
        return self.base.weight

    def merged(self) -> Matrix:
        """One matrix of the base's own kind that does the same, in float32."""
        raise NotImplementedError

    def split(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take the adapter's part from the weight and bias of a matrix that :meth:`merged` gave."""
        raise NotImplementedError


class WidenedInput(Widened):
    """The way into the hidden units: ``[W1; D] x + [b1; c]``, with D random and c zero at first.

    D is drawn as He et al. (2022) draw it: uniform in +-1 / sqrt(in).
    """

    def __init__(self, base: Matrix, width: int) -> None:
        features = _in_out(base)[0]
        super().__init__(base, nn.Linear(features, width, bias=base.bias is not None))
        nn.init.kaiming_uniform_(self.adapter.weight, a=math.sqrt(5))
        if self.adapter.bias is not None:
            nn.init.zeros_(self.adapter.bias)

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., hidden + width)."""
        return torch.cat([self.base(states), self.adapter(states)], dim=-1)

    def merged(self) -> Matrix:
        """``[W1; D]`` and ``[b1; c]``."""
        weight = torch.cat([_out_in(self.base), self.adapter.weight])
        bias = None
        if self.base.bias is not None:
            bias = torch.cat([self.base.bias.float(), self.adapter.bias])
        return _like(self.base, weight, bias)

    def split(self, weight: Tensor, bias: Tensor | None) -> None:
        """D and c are the last rows."""
        width = self.adapter.out_features
        self.adapter.weight.copy_(_turned(self.base, weight)[-width:])
        if bias is not None:
            self.adapter.bias.copy_(bias[-width:])


class WidenedOutput(Widened):
    """The way out of the hidden units: ``[W2, U] h + b2``, with U zero at first."""

    def __init__(self, base: Matrix, width: int) -> None:
        super().__init__(base, nn.Linear(width, _in_out(base)[1], bias=False))
        nn.init.zeros_(self.adapter.weight)

    def forward(self, states: Tensor) -> Tensor:
        """(..., hidden + width) to (..., out)."""
        own, extra = states.tensor_split([states.shape[-1] - self.adapter.in_features], dim=-1)
        result: Tensor = self.base(own) + self.adapter(extra)
        return result

    def merged(self) -> Matrix:
        """``[W2, U]`` and ``b2``."""
        weight = torch.cat([_out_in(self.base), self.adapter.weight], dim=1)
        return _like(self.base, weight, None if self.base.bias is None else self.base.bias.float())

    def split(self, weight: Tensor, bias: Tensor | None) -> None:
        """U is the last columns."""
        self.adapter.weight.copy_(_turned(self.base, weight)[:, -self.adapter.in_features :])


def _turned(matrix: Matrix, weight: Tensor) -> Tensor:
    """A weight of this kind of matrix as (out, in), and back."""
    return weight.T if isinstance(matrix, Conv1D) else weight


def _out_in(matrix: Matrix) -> Tensor:
    return _turned(matrix, matrix.weight).float()


def _in_out(matrix: Matrix) -> tuple[int, int]:
    out, features = _turned(matrix, matrix.weight).shape
    return features, out


def _like(matrix: Matrix, weight: Tensor, bias: Tensor | None) -> Matrix:
    """A matrix of the same kind with this weight of (out, in)."""
    out, features = weight.shape
    with torch.device("meta"):
        new: Matrix = (
            Conv1D(out, features)  # type: ignore[no-untyped-call]
            if isinstance(matrix, Conv1D)
            else nn.Linear(features, out, bias=bias is not None)
        )
    new.weight = nn.Parameter(_turned(matrix, weight.detach()).contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new
