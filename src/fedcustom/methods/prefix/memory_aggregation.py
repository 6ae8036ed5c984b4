"""Aggregation of prefix memories in each variant; the rules are ``aggregation/prefix_memory.py``
(docs/prefix_rules.md).

=========  ==========================  =============================================================
merging    sent up                     the server
=========  ==========================  =============================================================
mean       all slots                   mean of readers and of writers apart, by the recipe's rule: not
                                       the mean of the functions unless keys are frozen
alternate  readers, writers by turns   mean of the one, the other rests: exact in rounds of writers
matched    all slots                   mean of slots that were put into the order of the state's
stacked    all slots                   all clients' slots (exact), brought back to the state's number
=========  ==========================  =============================================================

Readers are keys, and rows and biases into feed-forward slots (D, c). Writers are values with the shifts of
queries, and columns out of feed-forward slots (U). The linear memory M goes with the writers; its mean is
exact, and every variant takes it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ...aggregation.lora import aggregation_error
from ...aggregation.prefix_memory import (
    Reading,
    Slots,
    compress_slots,
    matched_slots_mean,
    probes,
    stack_slots,
)
from ...core.errors import ModelError, RecipeError
from ...core.tensors import Tensors
from ...models.load import Base
from ..protocol import State, Values
from ..tuning.aggregation_hooks import AggregationHooks, ClientDelta, RoundAggregator
from ..tuning.feed_forward import FeedForward
from ..tuning.technique import TrainableModel
from .hidden_units import hidden_units

OWN_RULE = ("matched", "stacked")
"""Variants that merge slots by a rule of their own."""

ERROR_PROBES = 32
"""Inputs at which functions are compared for the aggregation error."""

FIT_PROBES = 512
"""Inputs at which the writers of compressed slots are fitted; more where there are many slots."""


@dataclass(frozen=True)
class Block:
    """The slots of one attention block or feed-forward network, by the names of their tensors.

    ``readers`` names the keys, or the matrix into the units (gated: two); ``biases`` is empty, or names one
    for each or nothing. ``writers`` names the values, with the shifts if there are any, or the matrix out of
    the units; ``linear`` the linear memory or nothing. ``reading`` is None where it is not known how the
    units read.
    """

    readers: tuple[str, ...]
    biases: tuple[str, ...]
    writers: tuple[str, ...]
    linear: str
    heads: bool
    reading: Reading | None
    shift: int = 0

    @property
    def names(self) -> set[str]:
        """The tensors of the slots."""
        return {*self.readers, *filter(None, self.biases), *self.writers}

    def slots(self, tensors: Mapping[str, Tensor]) -> Slots:
        """The slots: a group for each head, or one group for a network."""
        if self.heads:
            writers = torch.cat([tensors[name] for name in self.writers], -1)
            return Slots(tensors[self.readers[0]][:, :, None], writers)
        parts = [tensors[name] for name in self.readers]
        if self.biases:
            biases = [tensors[name] if name else torch.zeros(len(parts[0])) for name in self.biases]
            parts = [torch.cat([part, b[:, None]], 1) for part, b in zip(parts, biases, strict=True)]
        return Slots(torch.stack(parts, 1)[None], tensors[self.writers[0]].T[None])

    def tensors(self, slots: Slots) -> Tensors:
        """The inverse of :meth:`slots`."""
        if self.heads:
            size = slots.writers.shape[-1] - self.shift
            parts = [slots.writers[..., :size], slots.writers[..., size:]][: len(self.writers)]
            written = {name: part.contiguous() for name, part in zip(self.writers, parts, strict=True)}
            return written | {self.readers[0]: slots.readers[:, :, 0].contiguous()}
        rows = slots.readers[0].unbind(1)
        found = {self.writers[0]: slots.writers[0].T.contiguous()}
        if self.biases:
            biases = {name: part[:, -1] for name, part in zip(self.biases, rows, strict=True) if name}
            found |= {name: bias.contiguous() for name, bias in biases.items()}
            rows = tuple(part[:, :-1] for part in rows)
        return found | {name: part.contiguous() for name, part in zip(self.readers, rows, strict=True)}


class MemoryAggregation(AggregationHooks):
    """The recipe's rule for all slots; the head follows the rule of the recipe's aggregation.

    ``resting`` are the readers that do not travel (``keys = "frozen"``). With ``measured`` every round
    reports ``aggregation_error``: how far the function of the merged memory is from the weighted mean f of
    the clients' functions, at 32 standard normal inputs, the same in every round, over all blocks::

        sqrt(sum |merged(x) - f(x)|^2) / sqrt(sum |f(x)|^2)

    A function is what a block's memory adds at equal inputs: slots and linear memory before the output
    projection and to the query, for each head; the feed-forward slots' units times U. The server holds one
    sum of such outputs, and no client's tensors unless the rule needs them.
    """

    def __init__(self, merging: str, blocks: Sequence[Block], resting: Tensors, *, measured: bool) -> None:
        self.merging, self.blocks, self.resting, self.measured = merging, blocks, resting, measured
        self.own_rule = f"prefix merging {merging}" if merging in OWN_RULE else ""
        self.slots = {name for block in blocks for name in block.names}
        self.writers = {name for block in blocks for name in (*block.writers, block.linear) if name}
        self.readers = self.slots - self.writers

    def trains(self, name: str, round_number: int) -> bool:
        """With ``alternate``, readers in odd rounds and writers in even ones."""
        if self.merging != "alternate":
            return True
        return name not in (self.writers if round_number % 2 else self.readers)

    def round(self, state: State) -> RoundAggregator:
        """Begin to merge a round."""
        return MemoryRoundAggregator(self, state.tensors)

    def outputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What the memory adds at the sample inputs, with blocks of one form in one tensor each."""
        whole = {**self.resting, **tensors}
        alike: dict[Any, list[tuple[Block, Slots]]] = defaultdict(list)
        for block in self.blocks:
            slots = block.slots(whole)
            form = block.reading, bool(block.biases), bool(block.linear), block.shift, slots.readers.shape[2:]
            alike[form, slots.writers.shape[1:]].append((block, slots))
        return [_outputs(pairs, whole) for pairs in alike.values()]


class MemoryRoundAggregator(RoundAggregator):
    """One round: the mean of the clients' functions, and their slots where the rule needs them."""

    def __init__(self, hooks: MemoryAggregation, before: Tensors) -> None:
        self.hooks, self.before = hooks, before
        self.ideal: list[Tensor] = []
        self.weight = 0.0
        self.clients: list[tuple[Tensors, float]] = []

    def take(self, delta: ClientDelta) -> Tensors:
        """Add the client's function to the ideal; the rest is for the recipe's rule."""
        hooks = self.hooks
        mine = (hooks.slots | hooks.writers) & self.before.keys()
        # Of a memory of which clients keep parts to themselves, the function is not known here. The server's
        # own change (fltrust) has no weight.
        if not mine <= delta.sent.keys() or not delta.weight:
            return delta.change
        # A late change is added to the newest state, not to that which its client was sent.
        after = {n: self.before[n] for n in mine}
        for name in mine & delta.change.keys():
            after[name] = torch.add(after[name], delta.change[name], alpha=delta.discount)
        if hooks.measured:
            outputs = hooks.outputs(after)
            self.ideal = self.ideal or [torch.zeros_like(output) for output in outputs]
            for total, output in zip(self.ideal, outputs, strict=True):
                total.add_(output, alpha=delta.weight)
            self.weight += delta.weight
        if not hooks.own_rule:
            return delta.change
        self.clients.append(({name: after[name] for name in hooks.slots}, delta.weight))
        return {name: tensor for name, tensor in delta.change.items() if name not in hooks.slots}

    def merged(self, tensors: Tensors) -> tuple[Tensors, Values]:
        """The merged slots, and the relative distance of their function from the mean of the clients'."""
        hooks, own = self.hooks, dict[str, Tensor]()
        if self.clients:
            merge = _matched if hooks.merging == "matched" else _stacked
            for block in filter(_has_slots(self.before), hooks.blocks):
                clients = [(block.slots(client), weight) for client, weight in self.clients]
                own |= block.tensors(merge(block, clients, block.slots(self.before)))
            self.clients = []
        if not self.weight:
            return own, {}
        reached = hooks.outputs({**tensors, **own})
        ideal = [total / self.weight for total in self.ideal]
        error = aggregation_error(zip(reached, ideal, strict=True))
        return own, {"aggregation_error": error} if math.isfinite(error) else {}


@lru_cache(maxsize=8)
def _probes(count: int, size: int, biased: bool) -> Tensor:
    """Sample inputs, the same in every round."""
    return probes(count, size, biased=biased)


def _outputs(alike: Sequence[tuple[Block, Slots]], tensors: Mapping[str, Tensor]) -> Tensor:
    """The outputs of blocks of one form, one after another: (groups, rows, out), float32."""
    readers, writers = zip(*(slots for _, slots in alike), strict=True)
    joined, (block, _) = Slots(torch.cat(readers).float(), torch.cat(writers).float()), alike[0]
    inputs = _probes(ERROR_PROBES, joined.readers.shape[-1], bool(block.biases)).to(joined.readers)
    assert block.reading is not None
    added = block.reading.outputs(joined, inputs)
    if block.linear:
        unit = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + 1e-6)
        linear = torch.cat([tensors[each.linear] for each, _ in alike]).float()
        added = added + torch.nn.functional.pad(unit @ linear, (0, block.shift))
    return added


def _matched(block: Block, clients: Sequence[tuple[Slots, float]], before: Slots) -> Slots:
    return matched_slots_mean(clients, before)


def _stacked(block: Block, clients: Sequence[tuple[Slots, float]], before: Slots) -> Slots:
    assert block.reading is not None
    _, slots, _, size = before.readers.shape
    inputs = _probes(max(FIT_PROBES, 8 * slots), size, bool(block.biases))
    return compress_slots(stack_slots(clients), before, block.reading, inputs)


def memory_hooks(
    base: Base,
    merging: str,
    trainable: TrainableModel,
    memory: Mapping[str, Any] | None,
    found: FeedForward | None,
    activation: str,
) -> MemoryAggregation:
    """The hooks for the attention slots that ``memory`` describes as
    :func:`~.attention_slots.add_slots` takes it, and for feed-forward slots in the networks ``found``.

    Raises:
        ModelError: ``merging`` needs to know how the feed-forward slots read, and that cannot be told.
        RecipeError: ``merging`` is for slots, and there are none.
    """
    named = dict(trainable.model.named_parameters())
    readings: dict[tuple[str, float], Reading] = {}

    def reading(name: str, scale: float = 1.0) -> Reading:
        """One object for equal ones, so that blocks of one form are computed together."""
        return readings.setdefault((name, scale), Reading(ACT2FN[name], scale))

    blocks = []
    for place in () if memory is None else memory["places"]:
        slots = f"{place['query']}.slots"
        linear = f"{slots}.linear" if f"{slots}.linear" in named else ""
        scaled = reading(activation, place["size"] ** -0.5)
        shifts = (f"{slots}.shifts",) if f"{slots}.shifts" in named else ()
        writers = (f"{slots}.values", *shifts)
        shift = place["size"] if shifts else 0
        blocks.append(Block((f"{slots}.keys",), (), writers, linear, True, scaled, shift))
    networks = () if found is None else hidden_units(base, found, activation)
    for network in networks or ():
        weights = tuple(f"{name}.adapter.weight" for name in network.inputs)
        present = [f"{name}.adapter.bias" for name in network.inputs]
        biases = tuple(name if name in named else "" for name in present)
        units = reading(network.activation) if network.activation else None
        columns = (f"{network.output}.adapter.weight",)
        blocks.append(Block(weights, biases if any(biases) else (), columns, "", False, units))
    measured = networks is not None and all(block.reading is not None for block in blocks)
    if (networks is None and merging != "mean") or (merging == "stacked" and not measured):
        raise ModelError(
            f"method.merging = {merging!r} does not fit {base.name}: it cannot be told how the feed-forward "
            f"networks of its {base.model.config.model_type} code read their inputs; use method.merging = "
            "'mean', or method.feed_forward_slots = 0"
        )
    if merging != "mean" and not any(map(_has_slots(named), blocks)):
        raise RecipeError(
            f"method.merging = {merging!r}: there is nothing but a linear memory, whose mean is "
            "exact; use 'mean'"
        )
    resting = {name for block in blocks for name in block.names} - trainable.parameters.keys()
    frozen = {name: named[name].detach().to("cpu", torch.float32, copy=True) for name in resting}
    return MemoryAggregation(merging, blocks, frozen, measured=measured)


def _has_slots(tensors: Mapping[str, Tensor]) -> Callable[[Block], bool]:
    """Whether a block has any slots in these tensors."""
    return lambda block: tensors[block.writers[0]].numel() > 0
