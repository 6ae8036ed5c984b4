"""Aggregation of prefixes in each variant; the rules are ``aggregation/prefix.py`` (docs/prefix_rules.md)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...aggregation.prefix import barycentre, matched_mean, mean_of_selected, select_layers
from ...aggregation.prefix_stacking import Stacked, cluster_slots, stack_prefixes
from ...core.errors import UpdateError
from ...core.tensors import Tensors
from ..messages import typed
from ..protocol import Memory, State, Values
from ..tuning.aggregation_hooks import AggregationHooks, ClientDelta, RoundAggregator
from ..tuning.messages import TrainTask, TrainUpdate
from .messages import PrefixUpdate
from .settings import PrefixSettings

NAME = "prefix"

Distil = Callable[[Stacked, Tensor], Tensor]
"""From a stacked prefix and a start of the set length to a prefix of that length."""


class PrefixAggregation(AggregationHooks):
    """The recipe's rule for the prefix; the head follows the rule of the recipe's aggregation."""

    def __init__(self, settings: PrefixSettings, make_distil: Callable[[], Distil] | None) -> None:
        self.settings, self.make_distil = settings, make_distil
        self.distil: Distil | None = None
        self.own_rule = f"prefix merging {settings.merging}"
        if settings.layers_sent is not None:
            self.own_rule = "prefix layers_sent"
            self.update = PrefixUpdate

    def down(self, tensors: Tensors, client: str, round_number: int) -> Tensors:
        """The state. The server alone reads its public texts, before its first round: clients, who initialise
        the method too, open no file that a recipe names.
        """
        self.distiller()
        return tensors

    def distiller(self) -> Distil | None:
        """What brings a stacked prefix back to length on public texts, which are read once."""
        if self.make_distil is not None and self.distil is None:
            self.distil = self.make_distil()
        return self.distil

    def pack(self, update: TrainUpdate, task: TrainTask, memory: Memory) -> TrainUpdate:
        """With ``layers_sent``, the layers that changed most, and which ones they are."""
        count = self.settings.layers_sent
        if count is None:
            return update
        change = update.tensors
        layers = select_layers(change[NAME], count)
        return PrefixUpdate(
            {**change, NAME: change[NAME][layers]},
            update.weight,
            loss=update.loss,
            examples=update.examples,
            steps=update.steps,
            layers=layers,
        )

    def unpack(self, update: TrainUpdate, wanted: Tensors) -> Tensors:
        """The change with the layers in their places; those that were not sent have none."""
        count, expected, tensors = self.settings.layers_sent, wanted.get(NAME), update.tensors
        if count is None or expected is None or NAME not in tensors:
            return tensors
        layers = typed(update, PrefixUpdate).layers
        allowed = range(len(expected))
        if (
            not isinstance(layers, list)
            or len(layers) != count
            or any(type(layer) is not int or layer not in allowed for layer in layers)
            or len(set(layers)) != count
        ):
            raise UpdateError(f"layers {layers!r}: must be {count} different numbers below {len(expected)}")
        sent = tensors[NAME]
        if sent.shape != (count, *expected.shape[1:]):
            raise UpdateError(
                f"{NAME} has shape {tuple(sent.shape)}, not {(count, *tuple(expected.shape[1:]))}"
            )
        whole = sent.new_zeros(expected.shape)
        whole[layers] = sent
        return {**tensors, NAME: whole}

    def round(self, state: State) -> RoundAggregator:
        """Begin to merge a round."""
        return PrefixRoundAggregator(self, state.tensors[NAME])


class PrefixRoundAggregator(RoundAggregator):
    """One round's prefixes."""

    def __init__(self, hooks: PrefixAggregation, before: Tensor) -> None:
        self.hooks, self.before = hooks, before
        self.prefixes: list[tuple[Tensor, float]] = []
        self.layers: list[list[int]] = []

    def take(self, arrival: ClientDelta) -> Tensors:
        """Note the client's prefix; the rest is for the recipe's rule."""
        # A late change is added to the newest prefix, not to that which its client was sent.
        self.prefixes.append((self.before + arrival.discount * arrival.change[NAME], arrival.weight))
        self.layers.append(arrival.update.layers if isinstance(arrival.update, PrefixUpdate) else [])
        return {name: tensor for name, tensor in arrival.change.items() if name != NAME}

    def merged(self, tensors: Tensors) -> tuple[Tensors, Values]:
        """The prefix by the recipe's rule."""
        settings = self.hooks.settings
        if settings.layers_sent is not None:
            pairs = zip(self.prefixes, self.layers, strict=True)
            updates = [(prefix[layers], layers, weight) for (prefix, weight), layers in pairs]
            return {NAME: mean_of_selected(updates, self.before)}, {}
        if settings.merging == "matched":
            return {NAME: matched_mean(self.prefixes, self.before)}, {}
        if settings.compression == "cluster":
            stacked = stack_prefixes(self.prefixes)
            length = self.before.shape[3]
            return {NAME: cluster_slots(stacked.prefix, stacked.bias, length, start=self.before).prefix}, {}
        prefix = barycentre(self.prefixes, self.before)
        if (distil := self.hooks.distiller()) is not None:
            prefix = distil(stack_prefixes(self.prefixes), prefix)
        return {NAME: prefix}, {}
