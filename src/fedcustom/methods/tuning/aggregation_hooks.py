"""Aggregation hooks: how tensors travel and are aggregated in methods with rules of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...aggregation import robust
from ...aggregation.settings import AggregationSettings
from ...core.tensors import Tensors
from ..protocol import Aggregate, Memory, State, Values
from .further_exchange import FurtherExchange
from .messages import TrainTask, TrainUpdate

BASE_CHANGE = "base_change/"
"""Before the name of a base weight: what the server has added to it. Part of the state, never trained."""


@dataclass(frozen=True)
class ClientDelta:
    """One client's answer, in full shape.

    ``sent`` is what it was sent, ``change`` what it adds to that, ``weight`` its weight in a mean and
    ``discount`` what a late change is multiplied by; ``update`` is the answer as it was packed,
    ``round_number`` that of the task.
    """

    client: str
    sent: Tensors
    change: Tensors
    weight: float
    update: TrainUpdate
    discount: float = 1.0
    round_number: int = 1


class RoundAggregator:
    """What a method's own rules gather while one round's answers come in; this one gathers nothing."""

    def take(self, delta: ClientDelta) -> Tensors:
        """Note one delta; returns the part of its change that the recipe's rule is to combine."""
        return delta.change

    def merged(self, tensors: Tensors) -> tuple[Tensors, Values]:
        """The tensors that these rules set, given all that the recipe's rule has set; and what to report."""
        return {}, {}

    def ended(self, state: State, report: Values) -> Aggregate:
        """What the exchange comes to, given the state with all that was merged: the round's end, unless the
        rule needs a further exchange.
        """
        return Aggregate(state, report)

    def inner_products(self, changes: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The Gram matrix of changes, in the order taken, for rules that look at distances."""
        return robust.inner_products(changes)


class AggregationHooks:
    """All of the state goes down, all that was trained comes up, and the recipe's rule combines the changes.

    ``own_rule`` names the rule of a method that does not follow the recipe's, ``personal`` the parts of
    tensors' names that stay with each client, ``update`` is the class of what :meth:`pack` gives. ``linear``
    is whether the rule sees no more than the weighted mean of what clients send, so that their sum will do.
    ``turns`` names a method that sends its state in other coordinates in each round (:meth:`to_state`), so
    that no client can keep what it measured in them. ``packs`` says in words what is sent in place of changes
    of the trained tensors, where that has no coordinates of theirs.
    """

    update: type[TrainUpdate] = TrainUpdate

    own_rule: str = ""
    linear: bool = False
    turns: str = ""
    packs: str = ""
    personal: tuple[str, ...] = ()

    def initialise(self, tensors: Tensors) -> Tensors:
        """The first global state, from the tensors as the technique initialises them."""
        return tensors

    def down(self, tensors: Tensors, client: str, round_number: int) -> Tensors:
        """What a client is sent of the global state."""
        return tensors

    def trains(self, name: str, round_number: int) -> bool:
        """Whether a tensor is trained, and comes up, in a round."""
        return True

    def pack(self, update: TrainUpdate, task: TrainTask, memory: Memory) -> TrainUpdate:
        """What a client sends of an update that holds its whole change of what the ``task`` brought. What a
        further exchange of the round needs is put into its ``memory``.
        """
        return update

    def forms(self, wanted: Tensors, task: TrainTask) -> Tensors:
        """Names, shapes and dtypes of what :meth:`unpack` gives, where the trained tensors of a task have
        those of ``wanted``.
        """
        return wanted

    def unpack(self, update: TrainUpdate, wanted: Tensors) -> Tensors:
        """The change that :meth:`pack` packed, in the names and shapes of :meth:`forms`.

        Raises:
            UpdateError: it is not what was asked for.
        """
        return update.tensors

    def to_state(self, change: Tensors, sent: Tensors) -> Tensors:
        """A change of what a client was ``sent`` as one of the state that :meth:`down` made that from. It is
        linear, and no norm of tensors grows, so that bounds of changes stay.
        """
        return change

    def round(self, state: State) -> RoundAggregator:
        """Begin to merge a round."""
        return RoundAggregator()

    def further(self, settings: AggregationSettings) -> FurtherExchange | None:
        """The exchange after that of training, where the rule needs one; ``settings`` say how clients are
        weighted.
        """
        return None
