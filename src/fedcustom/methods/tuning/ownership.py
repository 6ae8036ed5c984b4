"""Ownership of tensors: which travel, which are frozen, and which stay with their clients."""

from __future__ import annotations

from ...core.errors import RecipeError
from ...core.tensors import Tensors, named, part, without
from ..protocol import Memory
from .aggregation_hooks import BASE_CHANGE, AggregationHooks
from .drift_corrections import CONTROL
from .messages import TrainTask
from .technique import Context, TrainableModel


class Ownership:
    """Who holds which tensors, by the recipe (``personalisation.keep``, ``baseline``) and the method's rules.

    ``personal`` are the names of tensors that stay with the clients.

    Raises:
        RecipeError: a part that the recipe names does not exist, or nothing is left to send.
    """

    def __init__(self, context: Context, trainable: TrainableModel, hooks: AggregationHooks) -> None:
        self.context = context
        self.trainable = trainable
        self.hooks = hooks
        federated = context.keeps == "nothing"
        self.personal = self._personal_names() if federated else frozenset()
        filled_in = not federated or self.personal or trainable.hooks
        self.initial: Tensors = trainable.read() if filled_in else {}

    def _personal_names(self) -> frozenset[str]:
        names: set[str] = set()
        keep = self.context.keep_local
        if any(wanted != "head" for wanted in keep) and self.hooks.own_rule:
            raise RecipeError(
                f"personalisation.keep = {list(keep)}: {self.hooks.own_rule} merges all but the head; "
                "allowed: head"
            )
        if any(wanted != "head" for wanted in keep) and self.hooks.turns:
            raise RecipeError(
                f"personalisation.keep = {list(keep)}: {self.hooks.turns} sends its factors in other "
                "coordinates in each round, in which none that is kept would fit; allowed: head"
            )
        available = self.trainable.forms().keys()
        for wanted in [*keep, *self.hooks.personal]:
            found = (
                self.trainable.head if wanted == "head" else {name for name in available if wanted in name}
            )
            if not found:
                known = [
                    *(["head"] if self.trainable.head else []),
                    *sorted(available - self.trainable.head)[:4],
                ]
                raise RecipeError(
                    f"personalisation.keep = {wanted!r}: no trained tensor has that in its name; "
                    f"there are {', '.join(known)}, ..."
                )
            names |= found
        if names >= available:
            raise RecipeError(f"personalisation.keep = {list(keep)}: leaves nothing to send")
        return frozenset(names)

    def resting(self, task: TrainTask) -> frozenset[str]:
        """The tensors that are neither trained nor sent: the head's, in the rounds that the recipe says,
        unless it was to be fitted before, and the server says that no fit came about.
        """
        training = self.context.training
        rests = task.round_number <= (training.freeze_head_rounds or 0)
        unfitted = bool(training.fit_head_rounds) and task.head_unfitted
        return self.trainable.head if rests and not unfitted else frozenset()

    def travelling(self, tensors: Tensors) -> Tensors:
        """Those that go between server and clients."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.personal}

    def comes_up(self, name: str, task: TrainTask) -> bool:
        """Whether a client's answer to a task has a tensor's change."""
        return (
            name not in self.personal
            and name not in self.resting(task)
            and not name.startswith(BASE_CHANGE)
            and self.hooks.trains(name, task.round_number)
        )

    def wanted(self, task: TrainTask) -> Tensors:
        """What an answer to the task must have the names, shapes and dtypes of."""
        return {
            name: tensor
            for name, tensor in task.tensors.items()
            if self.comes_up(name.removeprefix(CONTROL), task)
        }

    def complete(self, tensors: Tensors, memory: Memory | None = None) -> Tensors:
        """A state with the client's own tensors in it; what it lacks is as it was initialised."""
        return {**self.initial, **tensors, **(part(memory.tensors, "state/") if memory else {})}

    def remember(self, memory: Memory, after: Tensors, moments: Tensors) -> None:
        """Put into the client's memory what its role lets it keep."""
        kept = without(memory.tensors, "state/", "moments/")
        if self.context.keeps != "nothing":
            kept |= named({name: tensor.clone() for name, tensor in moments.items()}, "moments/")
        if self.context.keeps == "everything":
            kept |= named(without(after, BASE_CHANGE), "state/")
        kept |= named({name: after[name] for name in sorted(self.personal)}, "state/")
        memory.tensors = kept
