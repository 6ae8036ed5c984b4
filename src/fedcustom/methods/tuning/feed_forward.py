"""Feed-forward networks of a model, found by the sizes in its configuration."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...models.load import Base
from ...models.padding import FAILURES

WIDTHS = (
    ("encoder_ffn_dim", "decoder_ffn_dim"),
    ("intermediate_size",),
    ("ffn_dim",),
    ("d_ff",),
    ("n_inner",),
    ("ffn_hidden_size",),
    ("hidden_dim",),
    ("d_inner",),
)
"""What configurations call the number of hidden units; the first that widens the networks is used."""


@dataclass(frozen=True)
class FeedForward:
    """All feed-forward networks of a model.

    ``inputs`` names the matrices into the hidden units (two a network where it is gated), ``outputs`` those
    out of them; ``widths`` holds the configuration's keys of the number of hidden units, with their values.
    ``rest`` are the networks that are left as they are, where there are any.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    widths: Mapping[str, int]
    rest: FeedForward | None = None

    def wider(self, more: int) -> dict[str, int]:
        """The configuration's values for ``more`` hidden units in each network."""
        return {key: width + more for key, width in self.widths.items()}

    def of(self, names: Collection[str]) -> FeedForward:
        """The networks whose matrices are among these; ``rest`` are the others."""

        def part(*, chosen: bool) -> FeedForward:
            inputs, outputs = (
                tuple(name for name in every if (name in names) == chosen)
                for every in (self.inputs, self.outputs)
            )
            return FeedForward(inputs, outputs, self.widths)

        rest = part(chosen=False)
        return replace(part(chosen=True), rest=rest if rest.inputs else None)


def find_feed_forward(base: Base) -> FeedForward | None:
    """The feed-forward networks of a model, or None where their width is no setting of their own.

    Two models without weights are built, one of them with a hidden unit more, and compared. Only where
    nothing but matrices differs, each by one row or one column, can a network be widened by adding units.
    """
    model = base.model
    for keys in WIDTHS:
        widths = {key: _width(model.config, key) for key in keys}
        if None not in widths.values():
            found = _grown(base, {key: width for key, width in widths.items() if width})
            if found is not None:
                return found
    return None


def _width(config: Any, key: str) -> int | None:
    """The number of hidden units, which GPT-2 and its kin leave unset for four times the model's width."""
    if not hasattr(config, key):
        return None
    width = getattr(config, key)
    if width is None and isinstance(getattr(config, "hidden_size", None), int):
        width = 4 * config.hidden_size
    return width if type(width) is int else None


def _grown(base: Base, widths: Mapping[str, int]) -> FeedForward | None:
    before = _shapes(base.model, {})
    try:
        after = _shapes(base.model, {key: width + 1 for key, width in widths.items()})
    except FAILURES:  # a width that must be divisible
        return None
    if before.keys() != after.keys():
        return None
    inputs, outputs, biases = [], [], []
    for parameter in before:
        change = [new - old for new, old in zip(after[parameter], before[parameter], strict=True)]
        if not any(change):
            continue
        name, _, kind = parameter.rpartition(".")
        module = base.model.get_submodule(name)
        if not isinstance(module, nn.Linear | Conv1D) or name.split(".")[0] in base.head:
            return None
        if kind == "weight" and isinstance(module, Conv1D):
            change.reverse()
        if change == [1, 0]:
            inputs.append(name)
        elif change == [0, 1]:
            outputs.append(name)
        elif kind == "bias" and change == [1]:
            biases.append(name)
        else:
            return None
    if not inputs or not outputs or not set(biases) <= set(inputs):
        return None
    return FeedForward(tuple(inputs), tuple(outputs), dict(widths))


def _shapes(model: Any, changes: Mapping[str, int]) -> dict[str, torch.Size]:
    """The parameters' shapes of such a model, built without memory for its weights."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
