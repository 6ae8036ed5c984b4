"""What the messages of a recipe's method hold, and how many bytes they have."""

from __future__ import annotations

from dataclasses import fields
from statistics import mean

from ..federated.callbacks import Outline
from ..federated.schedule import Plan
from ..federated.simulation import Federation
from ..methods import WeightTuning
from ..methods.messages import KEY, Task, Update
from ..methods.tuning.messages import HeadTask
from ..recipe.recipe import Recipe
from ..transport.channel import Channel, task_length
from .report import MessageKind


def message_kinds(
    recipe: Recipe, federation: Federation, plan: Plan, cost: Outline
) -> tuple[list[MessageKind], str | None]:
    """The kinds of messages that a federated run may exchange, and why bytes are missing, where they are.

    Bytes of training are those of the :class:`~fedcustom.federated.callbacks.Outline`. Of other methods the
    tasks of the first round are made and measured; their answers are known only once clients have worked.
    """
    method = federation.method
    fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
    trained = isinstance(method, WeightTuning)
    measured: dict[str, int] = {}
    if not trained:
        work = {name: assignment.amount for name, assignment in plan[0].items()}
        channel = Channel(recipe.compression, federation.origin.tensors)
        lengths: dict[str, list[int]] = {}
        for task in method.configure(federation.origin, 1, work).values():
            lengths.setdefault(task.kind, []).append(task_length(task, channel.pack_down(task)))
        measured = {kind: round(mean(each)) for kind, each in lengths.items()}
    found = []
    for kind, pair in method.messages.items():
        if not recipe.method.exchanges(kind):
            continue
        if trained and not (fits if issubclass(pair.task, HeadTask) else len(fits) < len(plan)):
            continue
        training = trained and not issubclass(pair.task, HeadTask)
        found.append(
            MessageKind(
                kind=kind,
                asks=_first_sentence(pair.task),
                answer=_first_sentence(pair.update),
                contents=tuple(recipe.method.answer_contents(kind, pair.task.contents, recipe.data.task)),
                down_fields=_fields(pair.task),
                up_fields=_fields(pair.update),
                down=cost.down if training else measured.get(kind),
                up=cost.up if training else None,
            )
        )
    if trained:
        return found, None
    return found, "answers have as many bytes as clients find to say; a run counts them"


def _fields(message: type[Task] | type[Update]) -> tuple[str, ...]:
    return tuple(field.metadata.get(KEY, field.name) for field in fields(message))


def _first_sentence(message: type) -> str:
    """The first sentence of a message's docstring, without marks and references."""
    text = " ".join((message.__doc__ or "").split()).replace("``", "")
    sentence, stop, _ = text.partition(". ")
    return sentence.rstrip(".").partition(" (:class:")[0] if stop or text else ""
