"""The last linear layer of a classification head: where it is, and how its tensors are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.errors import RecipeError
from ...models.load import Base
from .technique import TrainableModel


@dataclass(frozen=True)
class HeadLayer:
    """The head's last layer, and the names by which its weight and bias travel."""

    module: nn.Linear
    weight: str
    bias: str

    @property
    def names(self) -> frozenset[str]:
        """Both names."""
        return frozenset({self.weight, self.bias})

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return self.module.out_features

    @property
    def width(self) -> int:
        """How many numbers the layer's input has."""
        return self.module.in_features


def last_layer(trainable: TrainableModel, base: Base) -> HeadLayer:
    """The head's last layer.

    Raises:
        RecipeError: the head has no such layer with a bias.
    """
    found = _output(trainable, base)
    if found is None or len(found[1]) != 2:
        raise RecipeError(
            f"training.fit_head_rounds: the head of {base.name} does not end in a layer with a bias"
        )
    return HeadLayer(found[0], *found[1])


def output_names(trainable: TrainableModel, base: Base) -> frozenset[str]:
    """The names by which weight and, where there is one, bias of a head's last linear layer travel; none
    where the head does not end in one.
    """
    found = _output(trainable, base)
    return frozenset(found[1]) if found else frozenset()


def _output(trainable: TrainableModel, base: Base) -> tuple[nn.Linear, list[str]] | None:
    """The last linear layer of the head that gives the logits, and the names of its weight and bias."""
    names: dict[int, str] = {id(trainable.parameters[name]): name for name in trainable.head}
    modules: Any = trainable.model.modules()
    for module in reversed(list(modules)):
        if not isinstance(module, nn.Linear) or module.out_features != len(base.task.labels):
            continue
        if id(module.weight) in names and (module.bias is None or id(module.bias) in names):
            return module, [names[id(p)] for p in (module.weight, module.bias) if p is not None]
    return None
