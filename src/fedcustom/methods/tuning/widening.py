"""Widened feed-forward networks: extra hidden units beside the frozen ones, in ``nn.Linear`` and in GPT-2's
``Conv1D``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...core.errors import RunError
from ...models.quantised_layers import device_of
from .feed_forward import FeedForward

Matrix = nn.Linear | Conv1D


class Widened(nn.Module):
    """A frozen matrix, ``base``, and the extra one, ``adapter``, that is trained."""

    def __init__(self, base: Matrix, adapter: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter.to(device_of(base))

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
        # A copy of the few extra units: autograd would keep all units for a view of them.
        result: Tensor = self.base(own) + self.adapter(extra.contiguous())
        return result

    def merged(self) -> Matrix:
        """``[W2, U]`` and ``b2``."""
        weight = torch.cat([_out_in(self.base), self.adapter.weight], dim=1)
        return _like(self.base, weight, None if self.base.bias is None else self.base.bias.float())

    def split(self, weight: Tensor, bias: Tensor | None) -> None:
        """U is the last columns."""
        self.adapter.weight.copy_(_turned(self.base, weight)[:, -self.adapter.in_features :])


class Widening:
    """``width`` extra hidden units in the feed-forward networks of ``model`` that were ``found``, put there
    in place. A plain model's networks are all as wide: the rest of them get units of zeros where the model is
    saved, which add nothing.
    """

    def __init__(self, model: Any, found: FeedForward, width: int, seed: int) -> None:
        self.model, self.width, self.sizes = model, width, found.wider(width)
        self.layers: dict[str, Widened] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in found.inputs:
                self.layers[name] = WidenedInput(model.get_submodule(name), width)
            for name in found.outputs:
                self.layers[name] = WidenedOutput(model.get_submodule(name), width)
        self.rest: dict[str, Matrix] = {}
        if found.rest is not None:
            self.rest = {n: model.get_submodule(n) for n in (*found.rest.inputs, *found.rest.outputs)}
            self._enters = frozenset(found.rest.inputs)
        self._put(self.layers)

    def names(self, *, inputs: bool = True) -> set[str]:
        """The names of the extra units' parameters; without ``inputs``, of those out of the units alone."""
        chosen = (n for n, layer in self.layers.items() if inputs or isinstance(layer, WidenedOutput))
        return {f"{name}.adapter.{kind}" for name in chosen for kind in ("weight", "bias")}

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """For the time of the context, the model is a plain one with wider feed-forward networks."""
        config = self.model.config
        before = {key: getattr(config, key) for key in self.sizes}
        try:
            self._put({name: layer.merged() for name, layer in self.layers.items()})
            self._put({name: self._padded(name, matrix) for name, matrix in self.rest.items()})
            for key, size in self.sizes.items():
                setattr(config, key, size)
            yield
        finally:
            self._put(self.layers)
            self._put(self.rest)
            for key, size in before.items():
                setattr(config, key, size)

    @torch.no_grad()
    def take(self, saved: Any, folder: Path, setting: str) -> None:
        """Take the extra units of a plain model, ``saved``, that was loaded from ``folder``.

        Raises:
            RunError: it is not as wide as the recipe's ``setting`` says, or has units where the recipe has
                none.
        """
        for key, size in self.sizes.items():
            if getattr(saved.config, key) != size:
                raise RunError(
                    f"{folder}: has {key} = {getattr(saved.config, key)}; with method.{setting} = "
                    f"{self.width} it must be {size}"
                )
        weights = saved.state_dict()
        for name, layer in self.layers.items():
            layer.split(weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        for name, matrix in self.rest.items():
            extra = _turned(matrix, weights[f"{name}.weight"])
            if (extra[-self.width :] if name in self._enters else extra[:, -self.width :]).any():
                raise RunError(
                    f"{folder}: has trained units in {name}, a layer that method.first_layer leaves as it is"
                )

    def _padded(self, name: str, matrix: Matrix) -> Matrix:
        """A frozen matrix with ``width`` rows, or columns, of zeros more."""
        weight, bias = _out_in(matrix), None if matrix.bias is None else matrix.bias.float()
        if name not in self._enters:
            return _like(matrix, functional.pad(weight, (0, self.width)), bias)
        wider = functional.pad(weight, (0, 0, 0, self.width))
        return _like(matrix, wider, None if bias is None else functional.pad(bias, (0, self.width)))

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.model.set_submodule(name, module)


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
