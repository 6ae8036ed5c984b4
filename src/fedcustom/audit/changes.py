"""Changes that a round shows: of single clients, and of the global state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..core.tensors import Tensors, norm, subtract
from ..methods import Task
from .attack import RoundView, Target
from .results import View


@dataclass(frozen=True)
class OneChange:
    """The change of one client's tensors, the task that it had, and by which view it is known."""

    client: str
    task: Task
    change: Tensors
    view: View


def single_changes(target: Target, seen: RoundView) -> list[OneChange]:
    """The changes of single clients: those of their messages, and of the state where one client alone took
    part. None that is empty.
    """
    knowledge = target.knowledge
    found = [
        OneChange(m.client, m.task, knowledge.change(m.task, m.update), "client's update")
        for m in seen.received
    ]
    if len(seen.answered) == 1:
        task = seen.task(target)
        moved = state_difference(seen, knowledge.wanted(task))
        found.append(OneChange(seen.answered[0], task, moved, "state difference"))
    return [each for each in found if each.change]


def state_difference(seen: RoundView, like: Mapping[str, Tensor]) -> Tensors:
    """The difference of the global states, where it has the names and shapes of a client's change; empty
    where nothing moved.
    """
    before, after = seen.before.tensors, seen.after.tensors
    names = [
        n for n, t in like.items()
        if n in before and n in after and before[n].shape == t.shape == after[n].shape
    ]  # fmt: skip
    found = subtract({n: after[n] for n in names}, {n: before[n] for n in names})
    return found if norm(found) else {}
