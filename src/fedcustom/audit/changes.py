"""Changes that a round shows: of single clients, and of the global state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..core.tensors import Tensors, add, dot, norm, scale, subtract
from ..methods import Task
from .attack import RoundView, Target
from .results import View

PARALLEL = 1e-6
"""By how much the cosine of two changes may be below 1 that are the same but for their length."""


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


def summed_change(target: Target, seen: RoundView) -> Tensors:
    """The weighted mean of the cohort's changes, which is what the server sees of them under secure sums.
    Where a run has none, it is computed from all clients' messages, unless the state moved along just that
    mean, or clients' changes are not merged by their mean; empty where there is no such thing.
    """
    knowledge = target.knowledge
    if seen.summed is not None:
        return knowledge.comparable(knowledge.change(seen.summed.task, seen.summed.update))
    settings, method = target.recipe.aggregation, target.recipe.method
    if not seen.received or seen.unseen or settings.needs_individual_updates or method.needs_single_updates:
        return {}
    total: Tensors = {}
    weights = 0.0
    for message in seen.received:
        change = knowledge.comparable(knowledge.change(message.task, message.update))
        weight = message.update.weight if settings.weighting == "examples" else 1.0
        if not change or (total and change.keys() != total.keys()):
            return {}
        total = add(total, scale(change, weight)) if total else scale(change, weight)
        weights += weight
    mean = scale(total, 1 / weights)
    moved = state_difference(seen, mean)
    turned = knowledge.in_state(mean, seen.received[0].task)
    sizes = norm(turned) * norm(moved)
    same = moved.keys() == turned.keys() and sizes > 0 and dot(turned, moved) > (1 - PARALLEL) * sizes
    return {} if same or not norm(mean) else mean


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
