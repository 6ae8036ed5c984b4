"""Sums of clients' changes as integers: how a change becomes a vector and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.errors import SecureSumError, UpdateError
from ..core.tensors import Tensors
from ..methods.messages import ChangeUpdate, RoundTask, Task, typed
from ..methods.tuning.messages import TrainTask, TrainUpdate
from ..methods.tuning.noised_sums import NoisedSums
from ..privacy.secure_sum.fixed_point import FixedPoint, counts, rounding_key
from ..privacy.secure_sum.integers import Numbers, zeros
from .protocol import Reply

SUM = "(sum)"
"""The name under which a sum of clients' changes arrives."""

FIGURES = 4
"""Numbers of a vector before those of the change: weight, steps, examples, weighted loss; of a further
exchange, which does not train, the weight alone.
"""

LARGEST_LOSS = 1024.0


@dataclass(frozen=True)
class ChangeVector:
    """How a client's change, weight, loss and numbers of steps and examples become one vector of integers,
    the same wherever the client is, and how their sum is read. What answers a further exchange of a round has
    no loss, steps and examples.

    Weights are shares of ``most_examples``, or 1 where that is None. The tensors of a change stand in the
    order of their names, each number times the client's weight.

    Args:
        bound: Largest size of one number of a change.
        sites: Most clients that are added up.
        most_examples: Training examples of the largest client; None: all clients weigh the same.
        seed: The recipe's.
        losses: Whether clients tell their loss; not where they hide their rows.
        noised: How clients add noise of their own to what they send, by which they are hidden.
    """

    bound: float
    sites: int
    most_examples: int | None
    seed: int
    losses: bool = True
    noised: NoisedSums | None = None

    def length(self, forms: Mapping[str, Tensor], *, trains: bool = True) -> int:
        """Numbers of a vector for changes of these names and shapes, of a task that ``trains`` or not."""
        return _figures(trains) + sum(tensor.numel() for tensor in forms.values())

    def encode(
        self,
        update: ChangeUpdate,
        forms: Mapping[str, Tensor],
        round_number: int,
        client: str,
        needed: int = 0,
    ) -> Numbers:
        """The vector of a client's update, whose tensors have the names and shapes of ``forms``. ``needed``
        is how many clients have to stay in this secure sum; noise depends on it.

        Raises:
            UpdateError: they have not; or a number is beyond its bound, which the message names.
        """
        if update.tensors.keys() != forms.keys():
            raise UpdateError("a change has other tensors than the task asks for")
        for name, tensor in update.tensors.items():
            if tensor.shape != forms[name].shape:
                raise UpdateError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(forms[name].shape)}")
        weight = 1 if self.most_examples is None else round(update.weight)
        if self.most_examples is not None and not 1 <= weight <= self.most_examples:
            raise UpdateError(
                f"secure_sum.most_examples = {self.most_examples}: a client has {weight} training examples"
            )
        share = weight / (self.most_examples or 1)
        trains = isinstance(update, TrainUpdate)
        result = zeros(self.length(forms, trains=trains), 32)
        if isinstance(update, TrainUpdate):
            result[: FIGURES - 1] = counts([weight, update.steps, update.examples], self.sites)
            told = (update.loss or 0.0) if self.losses else 0.0
            if not abs(told) <= LARGEST_LOSS:
                raise UpdateError(f"a training loss is beyond {LARGEST_LOSS:g}")
            loss = torch.tensor([share * told], dtype=torch.float64)
            key = rounding_key(self.seed, round_number, client, "")
            result[FIGURES - 1 : FIGURES] = FixedPoint(LARGEST_LOSS, self.sites).encode(loss.numpy(), key)
        else:
            result[:1] = counts([weight], self.sites)
        if self.noised is not None:
            parts = self.noised.encode(update.tensors, round_number, client, needed)
        else:
            parts = self._fixed(update.tensors, share, round_number, client)
        start = _figures(trains)
        for numbers in parts:
            result[start : start + len(numbers)] = numbers
            start += len(numbers)
        return result

    def _fixed(
        self, tensors: Mapping[str, Tensor], share: float, round_number: int, client: str
    ) -> Iterator[Numbers]:
        """The integers of each tensor, without noise."""
        fixed = FixedPoint(self.bound, self.sites)
        for name in sorted(tensors):
            values = (tensors[name].detach().cpu().reshape(-1).double() * share).numpy()
            try:
                yield fixed.encode(values, rounding_key(self.seed, round_number, client, name))
            except UpdateError as error:
                raise UpdateError(f"secure_sum.bound = {self.bound:g}: {name} holds {error}") from None

    def digest(self, task: bytes) -> bytes:
        """What masks depend on, of a task's SHA-256."""
        return task if self.noised is None else self.noised.bound_to(task)

    def decode(
        self,
        total: Numbers,
        forms: Mapping[str, Tensor],
        sites: int,
        round_number: int = 1,
        *,
        trains: bool = True,
    ) -> ChangeUpdate:
        """The mean of the updates of so many clients, from the sum of their vectors: its weight and examples
        are those of all of them, its steps the mean ones. With noise, the change is the sum over how many
        clients a round has on average. Of a task that ``trains`` it is a
        :class:`~fedcustom.methods.tuning.messages.TrainUpdate`.

        Raises:
            UpdateError: it is no such sum.
        """
        told = [int(number) for number in total[: FIGURES - 1 if trains else 1]]
        if len(total) != self.length(forms, trains=trains) or not min(told) >= sites:
            raise UpdateError("the sum of the clients' changes is malformed")
        weight = told[0]
        share = weight / (self.most_examples or 1)
        if not trains:
            return ChangeUpdate(self._floats(total[1:], forms, share), float(weight))
        _, steps, examples = told
        loss = float(FixedPoint(LARGEST_LOSS, self.sites).decode(total[FIGURES - 1 : FIGURES])[0]) / share
        if self.noised is not None:
            tensors = self.noised.decode(total[FIGURES:], forms, round_number)
        else:
            tensors = self._floats(total[FIGURES:], forms, share)
        return TrainUpdate(
            tensors,
            float(weight),
            loss=loss if self.losses else None,
            examples=examples,
            steps=max(1, round(steps / sites)),
        )

    def _floats(self, total: Numbers, forms: Mapping[str, Tensor], share: float) -> Tensors:
        start, fixed, tensors = 0, FixedPoint(self.bound, self.sites), Tensors()
        for name in sorted(forms):
            like = forms[name]
            values = torch.from_numpy(fixed.decode(total[start : start + like.numel()])).div_(share)
            tensors[name] = values.reshape(like.shape).to(like.dtype)
            start += like.numel()
        return tensors

    def opened(
        self, task: Task, total: Numbers, forms: Mapping[str, Tensor], sites: tuple[str, ...]
    ) -> Reply:
        """What the server gets of a round in place of single updates.

        Raises:
            UpdateError: it is no sum of so many clients' changes.
        """
        number, trains = typed(task, RoundTask).round_number, isinstance(task, TrainTask)
        update = self.decode(total, forms, len(sites), number, trains=trains)
        return Reply(SUM, task, update, "", "", 0, 0, 0.0, clients=sites)


def _figures(trains: bool) -> int:
    return FIGURES if trains else 1


def check_same_clients(task: Task, asked: Collection[str], sites: Collection[str]) -> None:
    """Refuse the sum of a further exchange of a round that is not of all clients of the sum before, which are
    those ``asked``: of two sums of different clients, the difference would show something of single ones.

    Raises:
        SecureSumError: says how many are missing.
    """
    if task.continues and set(sites) != set(asked):
        raise SecureSumError(
            f"exchange {task.place} of the round: {len(asked) - len(sites)} clients of the sum before did "
            "not answer, and a sum of the others would show something of their own; it is not opened"
        )


def closed(replies: list[Reply], opened: Callable[[tuple[str, ...]], Reply]) -> Iterator[Reply]:
    """Clients' replies, of which some are in a sum, and the sum that is ``opened``; where that fails, they
    are replies of clients that are left out.
    """
    sites = tuple(reply.client for reply in replies if reply.summed)
    found: Reply | None = None
    reason = ""
    if sites:
        try:
            found = opened(sites)
        except (SecureSumError, UpdateError) as error:
            reason = str(error)
    for reply in replies:
        if reply.summed and found is None:
            reply = replace(reply, summed=False, reason=reason, detail=f"{reason}\n")
        yield reply
    if found is not None:
        yield found
