"""Rounds in which the classification head is fitted in closed form, from sums that clients send."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..aggregation.discriminant import class_moments, discriminant
from ..data.examples import Example
from ..data.tokens import TokenizedExample, by_length
from ..errors import RecipeError, RunError, UpdateError
from ..models.forward import classification_logits
from ..models.load import Base
from ..tensors import Tensors, is_finite, part
from .contract import Answer, State, Update, Values
from .objective import Objective
from .technique import Tuned
from .update_checks import check_forms

FIT_HEAD = "fit head"
"""The kind of task that asks for a client's sums."""

LABEL_COUNTS = "label_counts"
"""The value of a state, and of a task, that says how many examples of each label all have who were asked."""

CLIENT_LABELS = "client_labels/"
"""Before a client's name: what the server keeps of how many examples of each label it has, (labels,)."""

COUNT = 0.5
"""Added to each label's number of examples in the head's bias, so that a label without any is unlikely, and
not impossible."""

ROUNDING = 1e-5
"""Of the sum of all squares: what float32 sums may lack in a direction."""

LEAST_SHARE = 1e-3
"""Of the inputs' mean square: the least that counts as their variance, which float32 sums must resolve."""


class HeadFit:
    """The last layer of a head, in closed form from the first two moments of what goes into it.

    In place of training, every client computes the inputs x of the head's last layer on its examples and
    sends, for each label, their number and sum x, and over all labels sum x x^T. These add up, so that label
    skew makes no difference: where all clients answer and have the same model below the head, the server's
    head is the one that all examples in one place would give. Each example counts as one, whatever
    ``aggregation.weighting`` says. It is linear discriminant analysis, shrunk towards one variance v in all
    directions (v the mean variance of the inputs), less the discriminant of the mean of all examples, which
    changes no prediction and keeps weights small. Sums for a closed form are those of Fed3R (Fani et al.
    2024); a head fitted before training against label skew is Legate et al. 2023 (FedNCM).

    With ``training.fit_head_clients`` it is fitted to so many clients, drawn at random. A fit to few clients
    would be no fit to all: where fewer than half of the ``clients`` that are asked answer, the head stays as
    it was.

    Discloses: what is named above. Where a client has one example with a label, its sum is that example's
    input to the head, from which a text may be guessed. The server keeps how many examples of each label each
    client has; with ``rounds.selection = "balanced"`` it draws cohorts by it, and every client is told in
    later rounds how many batches the mean client has. With logit adjustment every client is told how many
    examples of each label those who were asked have together; of two each then knows the other's.
    """

    def __init__(
        self, rounds: Collection[int], tuned: Tuned, objective: Objective, base: Base, clients: int = 1
    ) -> None:
        self.rounds, self.tuned, self.objective, self.base = frozenset(rounds), tuned, objective, base
        self.clients = clients
        self.names: frozenset[str] = frozenset()
        if rounds:
            self.layer, self.weight, self.bias = _last_layer(tuned, base)
            self.names = frozenset({self.weight, self.bias})

    def sums(
        self, examples: Sequence[Example], tokens: Sequence[TokenizedExample], batch_size: int
    ) -> Tensors:
        """What a client sends, of its examples in the model as it is: ``counts`` of (labels,), ``totals`` of
        (labels, width) and ``scatter``, the upper triangle of (width, width) row by row.
        """
        model, width = self.tuned.model, self.layer.in_features
        counts = torch.bincount(torch.tensor([e.label for e in examples]), minlength=self.layer.out_features)
        totals = torch.zeros(len(counts), width, dtype=torch.float64)
        scatter = torch.zeros(width, width, dtype=torch.float64)
        inputs: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            vectors = arguments[0].detach().double().cpu()
            if vectors.shape != (vectors.shape[0], width):
                raise RecipeError(f"training.fit_head_rounds: {self.base.name} has no head on one vector")
            inputs.append(vectors)

        model.eval()
        hook = self.layer.register_forward_pre_hook(note)
        try:
            # Compiled code would not see the hook, or would keep it.
            with torch.compiler.set_stance("force_eager"), torch.no_grad():
                for positions in by_length(tokens, batch_size):
                    batch = self.objective.collate([tokens[i] for i in positions])
                    with self.base.autocast():
                        classification_logits(model, batch)
                    vectors = inputs.pop()
                    totals.index_add_(0, batch["labels"].cpu(), vectors)
                    scatter += vectors.T @ vectors
        finally:
            hook.remove()
        upper = torch.triu_indices(width, width)
        return {
            "counts": counts,
            "totals": totals.float(),
            "scatter": scatter[upper[0], upper[1]].float(),
        }

    def check(self, update: Update, *, sent: bool = True) -> None:
        """Refuse what cannot be the sums of some examples; or any, unless they are to be ``sent``.

        Raises:
            UpdateError: says what is wrong.
        """
        classes, width = self.layer.out_features, self.layer.in_features
        wanted = {
            "counts": torch.empty(classes, dtype=torch.int64),
            "totals": torch.empty(classes, width),
            "scatter": torch.empty(width * (width + 1) // 2),
        }
        check_forms(update.tensors, wanted if sent else {})
        if not sent:
            return
        if not is_finite(update.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        counts, totals = update.tensors["counts"].double(), update.tensors["totals"].double()
        number = update.weight
        if not (isinstance(number, int | float) and 0 < number < 1e12 and float(counts.sum()) == number):
            raise UpdateError(f"weight {number!r} is not the number of examples")
        if (counts < 0).any() or totals[counts == 0].any():
            raise UpdateError("counts and totals are not those of examples")
        scatter = _symmetric(update.tensors["scatter"].double(), width)
        within = scatter - (totals.T / counts.clamp(min=1)) @ totals
        slack = ROUNDING * float(scatter.diagonal().clamp(min=0).sum()) + 1e-9
        _, failed = torch.linalg.cholesky_ex(within + slack * torch.eye(width, dtype=torch.float64))
        if failed:
            raise UpdateError("the scatter is smaller in some direction than the totals allow")

    def merge(self, state: State, answers: Iterable[Answer]) -> State:
        """The state with the fitted head, whose former momentum at the server is gone, and the number of
        examples of each label, of all and of each client that answered. Where fewer than half of those asked
        did, the head is as it was, and their labels alone are noted.
        """
        told: Tensors = {}

        def noted() -> Iterator[Tensors]:
            for answer in answers:
                told[CLIENT_LABELS + answer.client] = answer.update.tensors["counts"]
                yield answer.update.tensors

        sums = self._together(noted())
        values = {key: value for key, value in state.values.items() if key != "method"}
        if 2 * len(told) < self.clients:
            kept = f"not fitted: {len(told)} of {self.clients} clients answered"
            return State(state.tensors, {**state.server, **told}, values | {"method": {"head": kept}})
        fitted = self._solved(*sums)
        server = {
            name: torch.zeros_like(tensor) if name.partition("/")[2] in self.names else tensor
            for name, tensor in state.server.items()
        }
        counts = torch.stack(list(told.values())).sum(dim=0)
        values[LABEL_COUNTS] = counts.tolist()
        return State({**state.tensors, **fitted}, {**server, **told}, values)

    def label_counts(self, values: Values) -> list[int] | None:
        """What a task's values say of the labels of all clients; None before the head was first fitted.

        Raises:
            UpdateError: they are not counts of these labels.
        """
        counts = values.get(LABEL_COUNTS)
        if counts is None:
            return None
        if (
            not isinstance(counts, list)
            or len(counts) != self.layer.out_features
            or any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
        ):
            raise UpdateError(
                f"{LABEL_COUNTS} {counts!r}: must be {self.layer.out_features} whole numbers from 0"
            )
        return counts

    def fit(self, clients: Iterable[Tensors]) -> Tensors:
        """The last layer's weight and bias, from the sums of clients.

        Raises:
            RunError: no head comes of these sums.
        """
        return self._solved(*self._together(clients))

    def _together(self, clients: Iterable[Tensors]) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over all clients: ``counts``, ``totals`` and ``scatter``."""
        width = self.layer.in_features
        counts = torch.zeros(self.layer.out_features, dtype=torch.float64)
        totals = torch.zeros(len(counts), width, dtype=torch.float64)
        triangle = torch.zeros(width * (width + 1) // 2, dtype=torch.float64)
        for tensors in clients:
            counts += tensors["counts"]
            totals += tensors["totals"]
            triangle += tensors["scatter"]
        return counts, totals, triangle

    def _solved(self, counts: Tensor, totals: Tensor, triangle: Tensor) -> Tensors:
        """The last layer's weight and bias, from the sums over all clients.

        Raises:
            RunError: no head comes of these sums.
        """
        width = self.layer.in_features
        scatter = _symmetric(triangle, width)
        number = float(counts.sum())
        means, within = class_moments(counts, totals, scatter)
        centre = totals.sum(dim=0) / number
        squares = float(scatter.diagonal().mean()) / number
        variance = max(squares - float(centre.square().mean()), LEAST_SHARE * squares)
        within += variance * torch.eye(width, dtype=torch.float64)
        shares = (counts + COUNT) / (number + COUNT * len(counts))
        try:
            weight, bias = discriminant(means, within, shares)
            base_weight, base_bias = discriminant(centre[None], within, torch.ones(1, dtype=torch.float64))
        except RuntimeError as error:
            raise RunError(f"no head fits the clients' sums: {error}") from None
        fitted = {self.weight: (weight - base_weight).float(), self.bias: (bias - base_bias).float()}
        if not is_finite(fitted):
            raise RunError("the head fitted to the clients' sums is not finite: a sum was too large")
        return fitted


def client_labels(state: State) -> dict[str, list[int]]:
    """How many examples of each label the clients have that answered when a head was fitted."""
    return {name: counts.tolist() for name, counts in part(state.server, CLIENT_LABELS).items()}


def looked_at(answers: Iterable[Answer]) -> tuple[str, Iterator[Answer]]:
    """The kind of task that a round's answers are to, and all of them, held no longer than their reader holds
    them. There must be one at least.
    """
    stream = iter(answers)
    first = [next(stream)]

    def again() -> Iterator[Answer]:
        yield first.pop()
        yield from stream

    return first[0].task.kind, again()


def _symmetric(triangle: Tensor, width: int) -> Tensor:
    """The matrix with this upper triangle, row by row."""
    upper = torch.triu_indices(width, width)
    matrix = torch.zeros(width, width, dtype=triangle.dtype)
    matrix[upper[0], upper[1]] = triangle
    return matrix + matrix.triu(1).T


def _last_layer(tuned: Tuned, base: Base) -> tuple[nn.Linear, str, str]:
    """The head's last layer, and the names by which its weight and bias travel.

    Raises:
        RecipeError: the head has no such layer with a bias.
    """
    names: dict[int, str] = {id(tuned.parameters[name]): name for name in tuned.head}
    modules: Any = tuned.model.modules()
    for module in reversed(list(modules)):
        if not isinstance(module, nn.Linear) or module.out_features != len(base.task.labels):
            continue
        weight, bias = names.get(id(module.weight)), names.get(id(module.bias))
        if weight is not None and bias is not None:
            return module, weight, bias
    raise RecipeError(
        f"training.fit_head_rounds: the head of {base.name} does not end in a layer with a bias"
    )
