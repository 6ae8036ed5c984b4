"""What of clients' answers to one task is summed: changes, or exact figures, as one vector of integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..core.errors import RecipeError, UpdateError
from ..core.tensors import Tensors
from ..methods.messages import ChangeUpdate, RoundTask, Task, Update, typed
from ..methods.protocol import FigureForm, Method, SumsChanges, SumsFigures
from ..methods.tuning.messages import TrainTask
from ..privacy.secure_sum.fixed_point import FixedPoint, counts, rounding_key
from ..privacy.secure_sum.integers import Bits, Numbers, zeros
from ..privacy.secure_sum.terms import Terms
from .protocol import Reply
from .secure import SUM, ChangeVector


class SumVector(Protocol):
    """How clients' answers to one task become vectors of integers, and how their sum is read."""

    @property
    def bits(self) -> Bits:
        """Of an integer."""

    @property
    def length(self) -> int:
        """Numbers of a vector."""

    def encode(self, update: Update, client: str, needed: int) -> Numbers:
        """A client's vector. ``needed`` is how many clients have to stay in this secure sum.

        Raises:
            UpdateError: the update has another form, or a number is beyond its bound.
        """

    def digest(self, task: bytes) -> bytes:
        """What masks depend on, of a task's SHA-256."""

    def opened(self, total: Numbers, sites: tuple[str, ...]) -> Reply:
        """What the server gets of these clients' answers.

        Raises:
            UpdateError: it is no sum of so many clients' answers.
        """

    def check_weight(self, update: Update, announced: int, sites: int) -> None:
        """Refuse a sum whose weight is not that of so many clients, who have ``announced`` so many training
        examples.

        Raises:
            UpdateError: says both.
        """


@dataclass(frozen=True)
class ChangeSum:
    """Changes, weighted, of 32 bits (:class:`~.secure.ChangeVector`). ``forms`` has names and shapes."""

    bits: ClassVar[Bits] = 32

    vector: ChangeVector
    forms: Tensors
    task: Task

    @property
    def length(self) -> int:
        """Figures and tensors."""
        return self.vector.length(self.forms, trains=isinstance(self.task, TrainTask))

    def encode(self, update: Update, client: str, needed: int) -> Numbers:
        """See :meth:`~.secure.ChangeVector.encode`."""
        number, change = typed(self.task, RoundTask).round_number, typed(update, ChangeUpdate)
        return self.vector.encode(change, self.forms, number, client, needed)

    def digest(self, task: bytes) -> bytes:
        """Of the task, and of noise that clients add."""
        return self.vector.digest(task)

    def opened(self, total: Numbers, sites: tuple[str, ...]) -> Reply:
        """The mean change."""
        return self.vector.opened(self.task, total, self.forms, sites)

    def check_weight(self, update: Update, announced: int, sites: int) -> None:
        """The examples, or where all clients weigh the same, their number."""
        wanted = announced if self.vector.most_examples is not None else sites
        _check_weight(update, wanted, sites)


@dataclass(frozen=True)
class FigureSum:
    """Exact figures, as integers of 64 bits: the weight, then the tensors in the order of their names. Whole
    numbers stay as they are; others are rounded to steps of ``bound`` / 2^62
    (:class:`~..privacy.secure_sum.fixed_point.FixedPoint`). Since the bound is that of all clients' numbers
    together, no sum of what may be sent wraps.

    Args:
        forms: Of the answer's tensors.
        answer: The class of the answer.
        task: What is answered.
        sites: Most clients that are added up.
        seed: The recipe's, by which numbers are rounded.
    """

    bits: ClassVar[Bits] = 64

    forms: Mapping[str, FigureForm]
    answer: type[Update]
    task: Task
    sites: int
    seed: int

    @property
    def length(self) -> int:
        """The weight and the tensors."""
        return 1 + sum(math.prod(form.shape) for form in self.forms.values())

    def encode(self, update: Update, client: str, needed: int) -> Numbers:
        """A client's figures; in the last step, rounding is stochastic."""
        if update.tensors.keys() != self.forms.keys():
            raise UpdateError("figures have other names than the task asks for")
        number, start = typed(self.task, RoundTask).round_number, 1
        result = zeros(self.length, self.bits)
        result[:1] = counts([round(update.weight)], self.sites, self.bits)
        for name in sorted(self.forms):
            form, tensor = self.forms[name], update.tensors[name].detach().cpu()
            if tuple(tensor.shape) != form.shape:
                raise UpdateError(f"{name} has shape {tuple(tensor.shape)}, not {form.shape}")
            key = rounding_key(self.seed, number, client, f"{self.task.place}/{name}")
            try:
                numbers = self._integers(tensor.reshape(-1), form, key)
            except UpdateError as error:
                raise UpdateError(f"{name} holds {error}") from None
            result[start : start + len(numbers)] = numbers
            start += len(numbers)
        return result

    def _integers(self, tensor: Tensor, form: FigureForm, key: bytes) -> Numbers:
        if form.bound is None:
            return counts(tensor.tolist(), self.sites, self.bits)
        return FixedPoint(form.bound, 1, self.bits).encode(tensor.double().numpy(), key)

    def digest(self, task: bytes) -> bytes:
        """Of the task alone."""
        return task

    def opened(self, total: Numbers, sites: tuple[str, ...]) -> Reply:
        """The sums of the figures."""
        if len(total) != self.length or int(total[0]) >= 2**53:
            raise UpdateError("the sum of the clients' figures is malformed")
        start, tensors = 1, Tensors()
        for name in sorted(self.forms):
            form = self.forms[name]
            part = total[start : start + math.prod(form.shape)]
            start += len(part)
            if form.bound is None:
                found = torch.from_numpy(part.view("int64").copy())
            else:
                found = torch.from_numpy(FixedPoint(form.bound, 1, self.bits).decode(part))
            tensors[name] = found.reshape(form.shape)
        update = self.answer(tensors, float(total[0]))
        return Reply(SUM, self.task, update, "", "", 0, 0, 0.0, clients=sites)

    def check_weight(self, update: Update, announced: int, sites: int) -> None:
        """The examples; later in a round fewer may take part."""
        if not self.task.continues or update.weight > announced:
            _check_weight(update, announced, sites)


def _check_weight(update: Update, wanted: int, sites: int) -> None:
    if round(update.weight) != wanted:
        raise UpdateError(
            f"the sum of {sites} sites has the weight {update.weight:g}: when the run began they announced "
            f"{wanted}"
        )


@dataclass(frozen=True)
class Summation:
    """What of a run's answers is summed, and of how many clients: the same at the server and at each client.

    Attributes:
        method: whose clients' answers are summed.
        changes: how changes of tensors become vectors of integers.
        terms: of how many clients a sum is at the least.
    """

    method: SumsChanges
    changes: ChangeVector
    terms: Terms

    @classmethod
    def of(cls, method: Method, changes: ChangeVector, terms: Terms) -> Self:
        """The summation of a method's answers.

        Raises:
            RecipeError: its clients' changes cannot be summed.
        """
        if not isinstance(method, SumsChanges):
            raise RecipeError(
                "secure_sum.on = true: the method's clients do not send changes that can be summed"
            )
        return cls(method, changes, terms)

    def vector(self, task: Task) -> SumVector:
        """How clients' answers to a task are summed.

        Raises:
            UpdateError: they are neither changes nor figures that may be.
        """
        method, changes = self.method, self.changes
        if isinstance(method, SumsFigures) and (forms := method.figure_forms(task)) is not None:
            return FigureSum(forms, method.messages[task.kind].update, task, changes.sites, changes.seed)
        return ChangeSum(changes, method.change_forms(task), task)
