"""Hidden units of feed-forward networks: which matrices lead into them, and how they read an input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN

from ...models.load import Base
from ..tuning.feed_forward import FeedForward
from .attention_places import pass_one_token

ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "relu2", "silu")
"""Activations that are tried beside the one that the configuration names."""

TOLERANCE = 1e-2
"""Relative distance up to which hidden units are taken to be those of a formula: more than what bfloat16
rounds off, less than between two activations that differ in more than their approximation.
"""


@dataclass(frozen=True)
class HiddenUnits:
    """One network's hidden units, ``act(W x + b)``, or gated ``act(W_g x + b_g) (W_u x + b_u)``.

    ``inputs`` names the matrices W, or W_g and W_u; ``output`` the one that takes the units. ``activation``
    is a name in ``transformers``; empty where the units follow no such formula.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str


def hidden_units(base: Base, found: FeedForward, named: str) -> list[HiddenUnits] | None:
    """The hidden units of each network; None if it cannot be told which matrices belong together.

    A trial pass over one token shows the formula by its numbers, since names do not tell a gate from what it
    opens. Networks that the pass leaves out (other experts) are taken to be like the first one. ``named`` is
    the activation that the configuration names.

    Raises:
        ModelError: the model's code fails.
    """
    parts, rest = divmod(len(found.inputs), len(found.outputs))
    if rest:
        return None
    networks = [
        HiddenUnits(found.inputs[parts * at : parts * (at + 1)], output, "")
        for at, output in enumerate(found.outputs)
    ]
    seen: dict[str, Tensor] = {}

    def note_output(name: str) -> Any:
        return lambda _, __, output: seen.__setitem__(name, output.detach().flatten())

    def note_input(name: str) -> Any:
        return lambda _, inputs: seen.__setitem__(name, inputs[0].detach().flatten())

    modules = {name: base.model.get_submodule(name) for name in (*found.inputs, *found.outputs)}
    hooks = [modules[name].register_forward_hook(note_output(name)) for name in found.inputs]
    hooks += [modules[name].register_forward_pre_hook(note_input(name)) for name in found.outputs]
    try:
        pass_one_token(base)
    finally:
        for hook in hooks:
            hook.remove()

    told = {n.output: _told(n, seen, named) for n in networks if seen.keys() >= {*n.inputs, n.output}}
    first = next(iter(told.values()), None)
    return [told.get(n.output) or _like(n, first, networks) for n in networks]


def _told(network: HiddenUnits, seen: dict[str, Tensor], named: str) -> HiddenUnits:
    """The network with its matrices in order and its activation."""
    hidden = seen[network.output].float()
    tried = ((float((units - hidden).norm()), like) for units, like in _candidates(network, seen, named))
    distance, best = min(tried, key=lambda pair: pair[0], default=(float("inf"), network))
    return best if distance <= TOLERANCE * float(hidden.norm()) and hidden.any() else network


def _candidates(
    network: HiddenUnits, seen: dict[str, Tensor], named: str
) -> Iterator[tuple[Tensor, HiddenUnits]]:
    """What the hidden units would be by each formula. The first of equal ones counts: the named one."""
    given = [seen[name].float() for name in network.inputs]
    if len({len(units) for units in (*given, seen[network.output])}) > 1:
        return
    for name in dict.fromkeys((named, *ACTIVATIONS)):
        act = ACT2FN[name]
        if len(given) == 1:
            yield act(given[0]), replace(network, activation=name)
        if len(given) == 2:
            yield act(given[0]) * given[1], replace(network, activation=name)
            swapped = replace(network, inputs=network.inputs[::-1], activation=name)
            yield act(given[1]) * given[0], swapped


def _like(network: HiddenUnits, first: HiddenUnits | None, networks: Sequence[HiddenUnits]) -> HiddenUnits:
    """A network that was not seen, by the first one that was."""
    if first is None:
        return network
    in_order = any(first.inputs == each.inputs for each in networks)
    inputs = network.inputs if in_order else network.inputs[::-1]
    return replace(network, inputs=inputs, activation=first.activation)
