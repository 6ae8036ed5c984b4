"""Cost of a run before it begins: clients, rounds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..core.tensors import Tensors
from ..data.examples import Example, FederatedData
from ..data.many_clients import train_sizes
from ..methods.messages import ChangeUpdate, Task, Update, Work, typed
from ..methods.protocol import Memory, Method, State
from ..methods.tuning.head_disclosure import text_numbers
from ..methods.tuning.head_fit import HeadFit, as_if_fitted, fits_fully
from ..methods.tuning.head_messages import POINT, TEMPERATURES, factor_size, has_scatter, sums_of
from ..methods.tuning.messages import (
    HeadGradientTask,
    HeadGradientUpdate,
    HeadLossesUpdate,
    HeadSumsUpdate,
    ScaleHeadTask,
    SumGradientsTask,
    SumLossesTask,
    SumVectorsTask,
    TrainTask,
    TrainUpdate,
)
from ..methods.tuning.method import WeightTuning
from ..methods.tuning.summed_head import LabelTotals, repeats_of, wanted_examples
from ..methods.tuning.summed_head_fit import SummedHeadFit
from ..recipe.recipe import Recipe
from ..transport.channel import Channel, task_length, update_length
from ..updates.pipeline import on_client, update_transforms
from ..updates.transform import ClientContext, UpdateTransform
from .callbacks import Outline
from .schedule import Assignment, Plan

LOSS, DEVIATION, EXAMPLES = 1.0123456789012345, 1.0123456789012345, 16
"""Figures of about as many letters as those that clients send."""


def outline(recipe: Recipe, data: FederatedData, method: Method, state: State, plan: Plan) -> Outline:
    """What the rounds of a ``plan`` ask; with bytes, where a method's messages are alike in all rounds.

    Bytes are the lengths of messages as they are serialised (:mod:`fedcustom.transport.wire`), for tensors of
    the first round's forms; only the digits of a few figures are guessed.
    """
    cohort, sizes = recipe.rounds.cohort(len(data.clients)), train_sizes(data.clients)
    examples = sum(sizes) or None  # across sites the server does not know
    if recipe.baseline != "federated" or type(method) is not WeightTuning:
        return Outline(len(sizes), cohort, examples)
    channel = Channel(recipe.compression, state.tensors)
    transforms = update_transforms(recipe.compression)
    fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
    down = up = 0.0
    if first := next((number for number in range(1, len(plan) + 1) if number not in fits), None):
        labels = [examples or 1] * len(data.task.labels)  # as if a head had been fitted before
        before = [plan[number - 1] for number in fits if number < first]
        fitted = as_if_fitted(state, labels) if all(_fits(method, asked, data) for asked in before) else state
        down, up = _training(method, channel, transforms, fitted, first, plan[first - 1])
    rounds = [cohort for number, cohort in enumerate(plan, start=1) if number not in fits]
    costs = [sum(down + (not a.absent) * up for a in cohort.values()) for cohort in rounds]
    fitting = sum(_fitting(method, channel, state, number, plan[number - 1], data) for number in fits)
    searching = sum(sum(costs[:rounds]) for rounds in recipe.training.trials())
    return Outline(
        len(sizes),
        cohort,
        examples,
        round(down),
        round(up),
        round(fitting),
        round(searching),
        round(sum(costs) + fitting + searching),
    )


def _training(
    method: WeightTuning,
    channel: Channel,
    transforms: Sequence[UpdateTransform],
    state: State,
    number: int,
    cohort: Mapping[str, Assignment],
) -> tuple[float, float]:
    """The mean bytes to and from a client of a cohort that trains, in all exchanges of the round."""
    tasks = list(method.configure(state, number, {name: a.amount for name, a in cohort.items()}).values())
    down = _lengths(tasks, lambda task: _down(channel, task))
    up = _lengths(tasks, lambda task: _up(method, transforms, task))
    more_down = more_up = 0
    if (further := method.server.parts.further) is not None:
        task = further.first_task(tasks[0].tensors, number)
        more_down = _down(channel, task)
        answer = ChangeUpdate(further.forms(task), 16.0)
        more_up = update_length(on_client(transforms, answer, ClientContext("", task, Memory())))
    return sum(down) / len(tasks) + more_down, sum(up) / len(tasks) + more_up


def _lengths(tasks: Sequence[Task], length: Callable[[Task], int]) -> list[int]:
    """A length for each task, computed once for those whose tensors have the same forms: for all of them, but
    where clients have ranks of their own.
    """
    found: dict[Hashable, int] = {}
    forms = [tuple((name, tensor.shape) for name, tensor in task.tensors.items()) for task in tasks]
    for form, task in zip(forms, tasks, strict=True):
        if form not in found:
            found[form] = length(task)
    return [found[form] for form in forms]


def _down(channel: Channel, task: Task) -> int:
    """The bytes of a task."""
    return task_length(task, channel.pack_down(task))


def _up(method: WeightTuning, transforms: Sequence[UpdateTransform], task: Task) -> int:
    """The bytes of an answer to a task that trains: of a change that is zero everywhere."""
    asked = typed(task, TrainTask)
    change = {name: _zeros(tensor) for name, tensor in method.ownership.wanted(asked).items()}
    update = TrainUpdate(change, 16.0, loss=LOSS, examples=EXAMPLES, steps=1)
    update = method.hooks.pack(update, asked, Memory())
    return update_length(on_client(transforms, update, ClientContext("", task, Memory())))


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory."""
    return torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)


def _fitting(
    method: WeightTuning,
    channel: Channel,
    state: State,
    number: int,
    asked: Collection[str],
    data: FederatedData,
) -> int:
    """The bytes of a round in which these clients send what the head is fitted from."""
    tasks = method.configure(state, number, {name: Work() for name in asked})
    down = _lengths(list(tasks.values()), lambda task: _down(channel, task))
    if isinstance(method.head_fit, SummedHeadFit):
        first = next(iter(tasks.values()))
        counts = update_length(_figures(method, first))
        return (
            sum(down)
            + len(tasks) * counts
            + len(tasks) * _summed_steps(method, method.head_fit, number, asked, data)
        )
    sums = [head_sums(method, data.clients[name].train) for name in tasks]
    deviation = DEVIATION if method.head_fit.hides_rows else None
    up = [update_length(HeadSumsUpdate(own, float(own["counts"].sum()), deviation=deviation)) for own in sums]
    counted = [int(own["counted"].sum()) if "counted" in own else 0 for own in sums]
    scale, step = _steps(method.head_fit, number)
    scaled = sum(count > 0 for count in counted)
    stepped = sum(method.head_fit.may_step(count) for count in counted)
    return sum(down) + sum(up) + scaled * scale + stepped * step


def _fits(method: WeightTuning, asked: Collection[str], data: FederatedData) -> bool:
    """Whether enough of what these clients have takes part for the head to rest once it was fitted; across
    sites, where that is not known, it is taken to.
    """
    if isinstance(method.head_fit, SummedHeadFit) and not method.head_fit.noised:
        every, totals = label_totals(method, asked, data)
        admitted = totals.admitted(method.head_fit.owners)
        return not every.any() or fits_fully(every, torch.tensor(totals.counted) * admitted)
    sums = [head_sums(method, data.clients[name].train) for name in asked if data.clients[name].train]
    if not sums or method.head_fit.noised:
        return True
    counts, counted = (sum(own[name] for own in sums) for name in ("counts", "counted"))
    return fits_fully(torch.as_tensor(counts), torch.as_tensor(counted))


def _steps(fit: HeadFit, number: int) -> tuple[int, int]:
    """The bytes to and from a client in the further exchanges of a round, if none of them can be spared: of
    the losses, and of all gradients.
    """
    steps = fit.training.fit_head_steps
    if not steps or fit.noised:
        return 0, 0
    head = _zeros(torch.zeros(fit.layer.classes, fit.layer.width + 1))
    scale = task_length(ScaleHeadTask({POINT: head}, round_number=number))
    scale += update_length(HeadLossesUpdate({"losses": torch.zeros(len(TEMPERATURES))}, 16.0))
    step = task_length(HeadGradientTask({POINT: head}, round_number=number))
    step += update_length(HeadGradientUpdate({"gradient": head}, 16.0, objective=LOSS))
    return scale, steps * step


def _summed_steps(
    method: WeightTuning, fit: SummedHeadFit, number: int, asked: Collection[str], data: FederatedData
) -> int:
    """The bytes to and from a client in the exchanges that follow that of label counts, where the server is
    shown sums alone, if none of them can be spared.
    """
    if fit.noised:
        return 0
    counts, totals = label_totals(method, asked, data)
    if not counts.any():  # of sites, whose labels are not known
        every = (1,) * fit.layer.classes
        totals = LabelTotals(every, every, (fit.owners,) * fit.layer.classes)
    examples = totals.examples(fit.owners)
    if not examples:
        return 0
    vectors = SumVectorsTask(
        round_number=number, counted=totals.counted, needed=totals.needed, owners=totals.owners
    )
    tasks: list[tuple[Task, int]] = [(vectors, 1)]
    if steps := fit.training.fit_head_steps:
        head = {POINT: _zeros(torch.zeros(fit.layer.classes, fit.layer.width + 1))}
        tasks.append((SumLossesTask(head, round_number=number, examples=examples), 1))
        step = SumGradientsTask(head, round_number=number, examples=examples, step=1)
        tasks.append((step, steps if fit.may_step(examples) else 0))
    return sum(times * (task_length(t) + update_length(_figures(method, t))) for t, times in tasks)


def _figures(method: WeightTuning, task: Task) -> Update:
    """An answer to a task of which a head is fitted from sums alone: zeros, which travel as 64 bits each."""
    forms = method.figure_forms(task)
    assert forms is not None
    zero = torch.zeros(1, dtype=torch.int64)
    return method.messages[task.kind].update({name: zero.expand(form.shape) for name, form in forms.items()})


def label_totals(
    method: WeightTuning, asked: Collection[str], data: FederatedData
) -> tuple[Tensor, LabelTotals]:
    """How many examples of each label these clients have, (labels,), and what the server is told of them."""
    classes = method.head_fit.layer.classes
    counts = torch.zeros(classes, dtype=torch.int64)
    repeats = repeats_of({}, classes)
    for name in asked:
        examples = data.clients[name].train
        labels = torch.tensor([example.label for example in examples], dtype=torch.long)
        texts = text_numbers(method.tokens(examples))
        counts += torch.bincount(labels, minlength=classes)
        repeats += repeats_of(wanted_examples(labels, texts, method.head_fit.least), classes)
    return counts, LabelTotals.of(counts, repeats)


def head_sums(method: WeightTuning, examples: list[Example]) -> Tensors:
    """Tensors of the forms that a client with these examples sends for the head to be fitted."""
    fit = method.head_fit
    if fit.noised:
        classes, width = fit.layer.classes, fit.layer.width
        return {"counts": torch.zeros(1).expand(classes), "totals": torch.zeros(1).expand(classes, width)}
    labels = torch.tensor([example.label for example in examples], dtype=torch.long)
    texts = text_numbers(method.tokens(examples))
    forms = sums_of(torch.zeros(len(labels), 1), labels, texts, fit.layer.classes, fit.least)
    width, rows = fit.layer.width, int(min(int(forms["counted"].sum()), fit.layer.width))
    factor = factor_size(rows, width) if has_scatter(forms) else 0
    number = torch.zeros(1)
    return {**forms, "totals": number.expand(len(forms["totals"]), width), "factor": number.expand(factor)}
