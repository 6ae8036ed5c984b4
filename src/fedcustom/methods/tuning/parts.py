"""What server and clients of a method that trains tensors are both built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...aggregation.settings import AggregationSettings
from ...core.per_list import PerList
from ...data.examples import Example
from ...data.tokens import TokenizedExample
from ...models.load import Base
from .aggregation_hooks import AggregationHooks
from .drift_corrections import Correction
from .further_exchange import FurtherExchange
from .objective import Objective
from .ownership import Ownership
from .technique import Context, TrainableModel

RATE_FACTOR = "rate_factor"
"""The value of a state by which the recipe's learning rate is multiplied: what a search of rates found."""


@dataclass
class TuningParts:
    """The resident model with its trained tensors, and the rules by which they are trained and merged.

    ``base`` is the context's base model once it is known how the method's rows share a batch, ``aggregation``
    the recipe's settings of that name (for a baseline, those that merge nothing by rules), ``head_rounds``
    the rounds in which clients fit the head, ``further`` the exchange that the method's own rule needs after
    that of training, ``bounded_groups`` in how many groups the tensors are bounded
    that are released where clients are hidden.
    """

    context: Context
    trainable: TrainableModel
    objective: Objective
    base: Base
    aggregation: AggregationSettings
    hooks: AggregationHooks
    correction: Correction
    ownership: Ownership
    head_rounds: frozenset[int]
    further: FurtherExchange | None = None
    bounded_groups: int = 2


class TokenCache:
    """The tokens of lists of examples, computed once a list."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._tokens = PerList[list[TokenizedExample]]()

    def of(self, examples: list[Example]) -> list[TokenizedExample]:
        """The tokens of one list."""
        self.add([examples])
        return self._tokens[examples]

    def add(self, lists: Sequence[list[Example]]) -> None:
        """Have the tokens of all these lists, with one call to the tokenizer, which many small ones slow."""
        unique = {id(examples): examples for examples in lists}
        new = [examples for examples in unique.values() if examples not in self._tokens]
        rest = self.objective.tokens([example for examples in new for example in examples])
        for examples in new:
            self._tokens[examples] = rest[: len(examples)]
            rest = rest[len(examples) :]
