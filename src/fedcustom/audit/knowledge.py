"""Knowledge of an attacker: what the base model and a state give for a text that is guessed.

The server and every client have the base model and the recipe, so that all of this costs them only time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..core.tensors import Tensors, without
from ..data.examples import Example
from ..methods import Task, WeightTuning
from ..methods.messages import Update, typed
from ..methods.tuning.drift_corrections import CONTROL
from ..methods.tuning.messages import TrainTask, TrainUpdate


class Knowledge:
    """What can be computed of guessed texts with a method's model; its resident model is used for it, whose
    tensors every task sets anew.
    """

    def __init__(self, method: WeightTuning) -> None:
        self.method = method
        self.parts = method.client.parts

    def enter(self, task: Task) -> None:
        """Put the state of a task into the model, as a client without a memory does."""
        sent = without(task.tensors, CONTROL)
        self.parts.trainable.write(self.parts.ownership.complete(sent))

    def vectors(self, examples: Sequence[Example]) -> Tensor:
        """What goes into the head's last layer for each example, (examples, width)."""
        return self.method.client.head.inputs(self.parts.objective.tokens(examples))

    def texts(self, example: Example) -> list[list[int]]:
        """The texts that training passes through the model for an example, as tokens without padding."""
        (tokens,) = self.parts.objective.tokens([example])
        batch, found = self.parts.objective.collate([tokens]), list[list[int]]()
        for ids, mask in (("input_ids", "attention_mask"), ("passage_ids", "passage_mask")):
            for row, kept in zip(batch.get(ids, []), batch.get(mask, []), strict=True):
                found.append(row[kept.bool()].tolist())
        return found

    def tokens(self, example: Example) -> frozenset[int]:
        """The numbers of the tokens that training passes through the model for an example."""
        return frozenset(token for text in self.texts(example) for token in text)

    def change(self, task: Task, update: Update) -> Tensors:
        """The change of a client's tensors, in full shape, as the server reads it from its message; of what a
        method sends in place of some, or in a further exchange of a round, none.
        """
        if not isinstance(task, TrainTask):
            return {}
        wanted = self.parts.ownership.wanted(task)
        found = self.parts.hooks.unpack(typed(update, TrainUpdate), wanted)
        return {name: tensor for name, tensor in without(found, CONTROL).items() if name in wanted}

    def wanted(self, task: Task) -> Tensors:
        """The tensors of a task to train that a client is to train, as they are sent to it."""
        return dict(self.parts.ownership.wanted(typed(task, TrainTask)))

    def in_state(self, gradient: Tensors, task: Task) -> Tensors:
        """A gradient by what a client was sent with a task, in the coordinates of the server's state."""
        return self.parts.hooks.to_state(gradient, task.tensors)

    def comparable(self, change: Mapping[str, Tensor]) -> Tensors:
        """Of a change, the tensors that have the names and shapes in which gradients come."""
        if not self.parts.trainable.corrects:
            return {}
        parameters = self.parts.trainable.parameters
        return {n: t for n, t in change.items() if n in parameters and parameters[n].shape == t.shape}

    def gradient(self, example: Example, names: Sequence[str]) -> Tensors:
        """The loss's gradient for one example in the model as it is; zeros where a tensor has none."""
        parts = self.parts
        parts.trainable.model.eval()
        chosen = {name: parts.trainable.parameters[name] for name in names}
        rest = [name for name, parameter in chosen.items() if not parameter.requires_grad]
        for name in rest:
            chosen[name].requires_grad_(True)
        try:
            batch = parts.objective.collate(parts.objective.tokens([example]))
            loss = parts.objective.loss(parts.trainable.model, batch)
            found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        finally:
            for name in rest:
                chosen[name].requires_grad_(False)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for (name, parameter), gradient in zip(chosen.items(), found, strict=True)
        }

    def embedding(self) -> str | None:
        """The name by which the table of input embeddings travels, (tokens, width); None where it is not
        trained.
        """
        table = self.parts.base.model.get_input_embeddings().weight
        named = self.parts.trainable.parameters.items()
        return next((name for name, parameter in named if parameter is table), None)

    def ties_embeddings(self) -> bool:
        """Whether the output layer is the table of input embeddings, whose gradient has all rows."""
        output = self.parts.base.model.get_output_embeddings
        layer = output() if callable(output) else None
        return layer is not None and layer.weight is self.parts.base.model.get_input_embeddings().weight
