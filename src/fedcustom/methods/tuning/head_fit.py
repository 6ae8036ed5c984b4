"""Head fitting: the classification head from sums and gradients over clients' frozen vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...aggregation.discriminant import class_moments, discriminant, shrunk
from ...aggregation.logistic import LogisticFit, loss_and_gradient
from ...core.errors import AggregationError, RecipeError, UpdateError
from ...core.tensors import Tensors, is_finite, part
from ...data.examples import Example
from ...data.tokens import TokenizedExample, by_length
from ...models.forward import classification_logits
from ...models.load import Base
from ...training.settings import TrainingSettings
from ..protocol import UNFINISHED, Answer, State, Task, Update, Values
from .head_messages import (
    FIT_HEAD,
    HEAD_GRADIENT,
    LEAST,
    POINT,
    SCALE_HEAD,
    TEMPERATURES,
    Sums,
    check_answer,
    sums_of,
)
from .messages import (
    FitHeadTask,
    HeadGradientTask,
    HeadGradientUpdate,
    HeadLossesUpdate,
    HeadSumsUpdate,
    HeadTask,
    ScaleHeadTask,
    TrainTask,
)
from .objective import Objective
from .technique import TrainableModel
from .update_checks import check_forms

LABEL_COUNTS = "label_counts"
"""The value of a state, and of a task, that says how many examples of each label all have who were asked."""

CLIENT_LABELS = "client_labels/"
"""Before a client's name: what the server keeps of how many examples of each label it has, (labels,)."""

COUNT = 0.5
"""Added to each label's number of examples in the head's bias, so that a label without any is unlikely, and
not impossible."""

LEAST_SHARE = 1e-3
"""Of the inputs' mean square: the least that counts as their variance, which float32 sums must resolve."""


@dataclass
class _Fit:
    """A fit under way at the server: the head so far, and what is asked next."""

    clients: int
    sums: Sums
    examples: float = 0.0
    logistic: LogisticFit | None = None
    report: list[str] = field(default_factory=list)


class HeadFit:
    """The last layer of a head on vectors x that do not change while it is fitted (a linear probe).

    First each client sends sums: for each label the number of its examples and, where it has two or more
    (:data:`~.head_messages.LEAST`), sum x; and over those the triangular factor R of sum x x^T = R^T R, which
    has no more rows than there are examples. They add up to a linear discriminant, whose covariance is shrunk
    by :func:`~fedcustom.aggregation.discriminant.shrunk`, less the discriminant of the mean of all examples,
    which changes no prediction and keeps weights small. Then, in ``training.fit_head_steps`` further
    exchanges of the same round, clients send the loss of that head at several temperatures, and losses and
    gradients from which the server finds the logistic regression of all their examples
    (:class:`~fedcustom.aggregation.logistic.LogisticFit`). No text passes through the model again: a client
    keeps its vectors until the round is over. Label skew makes no difference, since all of it adds up; each
    example counts as one, whatever ``aggregation.weighting`` says. Which of the two heads is kept is decided
    on the development split. Sums for a closed form are those of Fed3R (Fani et al. 2024); a head fitted
    before training against label skew is Legate et al. 2023 (FedNCM).

    With ``training.fit_head_clients`` it is fitted to so many clients, drawn at random. A fit to few clients
    would be no fit to all: where fewer than half of the ``clients`` that are asked answer, the head stays as
    it was.

    Discloses: what is named above. A client with one example takes no part but for its label. Sums and
    gradients over few examples of a label say much about their vectors, from which texts may be guessed; of
    the only example of its label at a client, the gradient gives the vector to a server that looks for it.
    The server keeps how many examples of each label each client has; with ``rounds.selection = "balanced"``
    it draws cohorts by it, and every client is told in later rounds how many batches the mean client has.
    With logit adjustment every client is told how many examples of each label those who were asked have
    together; of two each then knows the other's.
    """

    def __init__(
        self,
        training: TrainingSettings,
        rounds: int,
        trainable: TrainableModel,
        objective: Objective,
        base: Base,
        *,
        clients: int = 1,
        batch_size: int = 64,
    ) -> None:
        self.training, self.trainable, self.objective, self.base = training, trainable, objective, base
        self.rounds = training.rounds_of_head_fits(rounds)
        self.clients, self.batch_size = clients, batch_size
        self.names: frozenset[str] = frozenset()
        self.fitting: _Fit | None = None
        self.vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.read: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        if self.rounds:
            self.layer, self.weight, self.bias = last_layer(trainable, base)
            self.names = frozenset({self.weight, self.bias})

    # --- client ---

    def execute(
        self, task: HeadTask, name: str, examples: Sequence[Example], tokens: Sequence[TokenizedExample]
    ) -> Update:
        """A client's answer to a task about the head; for the first the model holds the state.

        Raises:
            UpdateError: its vectors are gone, since its process was started anew within the round; or more
                steps are asked for than the recipe says.
        """
        number = float(len(examples))
        if isinstance(task, FitHeadTask):
            labels = torch.tensor([example.label for example in examples])
            vectors = self.read.pop(name) if name in self.read else self.inputs(tokens)
            self.vectors[name], self.steps[name] = (vectors, labels), 0
            return HeadSumsUpdate(self.sums(vectors, labels), number)
        if name not in self.vectors:
            raise UpdateError("the vectors of this round are gone: this client was started anew")
        self.steps[name] += 1
        if self.steps[name] > self.training.fit_head_steps + 1:
            raise UpdateError(
                f"more steps were asked for than training.fit_head_steps = {self.training.fit_head_steps}"
            )
        vectors, labels = self.vectors[name]
        if len(labels) < LEAST:  # nothing of a single example
            vectors, labels = vectors[:0], labels[:0]
        point = task.tensors[POINT]
        if isinstance(task, ScaleHeadTask):
            logits = vectors.double() @ point[:, :-1].double().T + point[:, -1].double()
            losses = [
                float(functional.cross_entropy(scale * logits, labels, reduction="sum"))
                for scale in TEMPERATURES
            ]
            return HeadLossesUpdate({"losses": torch.tensor(losses)}, float(len(labels)))
        loss, gradient = loss_and_gradient(point, vectors, labels)
        return HeadGradientUpdate({"gradient": gradient.float()}, float(len(labels)), objective=loss)

    def forget(self) -> None:
        """Drop the clients' vectors: the model changes."""
        self.vectors.clear()
        self.read.clear()

    def inputs(self, tokens: Sequence[TokenizedExample]) -> Tensor:
        """What goes into the head's last layer for each example in the model as it is, (examples, width)."""
        model, width = self.trainable.model, self.layer.in_features
        found = torch.zeros(len(tokens), width)
        noted: list[Tensor] = []

        def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            vectors = arguments[0].detach().float().cpu()
            if vectors.shape != (vectors.shape[0], width):
                raise RecipeError(f"training.fit_head_rounds: {self.base.name} has no head on one vector")
            noted.append(vectors)

        model.eval()
        hook = self.layer.register_forward_pre_hook(note)
        try:
            # Compiled code would not see the hook, or would keep it.
            with torch.compiler.set_stance("force_eager"), torch.no_grad():
                for positions in by_length(tokens, self.batch_size, equal=self.base.padding == "none"):
                    batch = self.objective.collate([tokens[i] for i in positions])
                    with self.base.autocast():
                        classification_logits(model, batch)
                    found[positions] = noted.pop()
        finally:
            hook.remove()
        return found

    def sums(self, vectors: Tensor, labels: Tensor) -> Tensors:
        """What a client sends first (:func:`~.head_messages.sums_of`)."""
        return sums_of(vectors, labels, self.layer.out_features)

    def alone(self, vectors: Tensor, labels: Tensor) -> Tensors:
        """The head of a client that keeps everything to itself."""
        together = Sums.of(vectors, labels, self.layer.out_features)
        if not self.training.fit_head_steps:
            return self.discriminant(together)
        fit = self._logistic(together)
        while not fit.done:
            fit.tell(*loss_and_gradient(fit.point, vectors, labels), len(labels))
        return self._head(fit.best)

    # --- server ---

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """What is asked after the first exchange of a round; nothing of clients with a single example."""
        assert self.fitting is not None
        kind = str(state.values[UNFINISHED])
        fit = self.fitting.logistic
        if kind == HEAD_GRADIENT and fit is not None:
            point = fit.point.float()
        else:
            point = torch.cat([state.tensors[self.weight], state.tensors[self.bias][:, None]], dim=1)
        counts = {name: state.server.get(CLIENT_LABELS + name) for name in names}
        some = [name for name, found in counts.items() if found is None or int(found.sum()) >= LEAST]
        asked = HeadGradientTask if kind == HEAD_GRADIENT else ScaleHeadTask
        return {name: asked({POINT: point}, round_number=round_number) for name in some}

    def check(self, task: Task, update: Update, *, sent: bool = True) -> None:
        """Refuse what cannot be an answer to a task about the head; or any, unless they are to be ``sent``.

        Raises:
            UpdateError: says what is wrong.
        """
        if sent:
            check_answer(task, update, self.layer.out_features, self.layer.in_features)
        else:
            check_forms(update.tensors, {})

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> State:
        """The state after one exchange of a round that fits the head; :data:`UNFINISHED` in its values says
        what is asked next, if anything is. The first one holds the discriminant, the last one the logistic
        regression.
        """
        if kind == FIT_HEAD:
            return self._begin(state, answers)
        assert self.fitting is not None
        fitting = self.fitting
        examples, loss, answered = 0, 0.0, 0
        tensor: Tensor | None = None
        for answer in answers:
            update = answer.update
            (sent,) = update.tensors.values()
            tensor = sent.double() if tensor is None else tensor + sent.double()
            examples += int(state.server[CLIENT_LABELS + answer.client].sum())  # as it said at first
            answered += 1
            loss += update.objective if isinstance(update, HeadGradientUpdate) else 0.0
        if tensor is None or 2 * answered < fitting.clients or not examples:
            return self._finished(
                state, f"{answered} of {fitting.clients} clients went on; kept the discriminant"
            )
        if kind == SCALE_HEAD:
            scale = TEMPERATURES[int(tensor.argmin())]
            head = {name: scale * state.tensors[name] for name in self.names}
            fitting.logistic = self._logistic(fitting.sums)
            return State({**state.tensors, **head}, state.server, {**state.values, UNFINISHED: HEAD_GRADIENT})
        fit = fitting.logistic
        assert fit is not None
        fit.tell(loss, tensor, examples)
        if not fit.done:
            return state
        head = self._head(fit.best)
        if not is_finite(head):
            return self._finished(state, "the logistic regression is not finite; kept the discriminant")
        return self._finished(State({**state.tensors, **head}, state.server, state.values), "")

    def _begin(self, state: State, answers: Iterable[Answer]) -> State:
        """The state with the discriminant as its head, whose former momentum at the server is gone, and the
        number of examples of each label, of all and of each client that answered. Where fewer than half of
        those asked did, the head is as it was, and their labels alone are noted.
        """
        told: Tensors = {}
        sums = Sums.zero(self.layer.out_features, self.layer.in_features)
        for answer in answers:
            told[CLIENT_LABELS + answer.client] = answer.update.tensors["counts"].long()
            sums.add(answer.update.tensors)
        values = {key: value for key, value in state.values.items() if key != "method"}
        if 2 * len(told) < self.clients:
            kept = f"not fitted: {len(told)} of {self.clients} clients answered"
            return State(state.tensors, {**state.server, **told}, values | {"method": {"head": kept}})
        if not sums.sent.any():
            kept = "not fitted: no client has two examples of a label"
            return State(state.tensors, {**state.server, **told}, values | {"method": {"head": kept}})
        fitted = self.discriminant(sums)
        server = {
            name: torch.zeros_like(tensor) if name.partition("/")[2] in self.names else tensor
            for name, tensor in state.server.items()
        }
        values[LABEL_COUNTS] = torch.stack(list(told.values())).sum(dim=0).tolist()
        number, withheld = int(sums.counts.sum()), int((sums.counts - sums.sent).sum())
        said = f"fitted to {number} examples of {len(told)} clients"
        if withheld:
            said += f" ({withheld} of them, the only ones of their label at a client, not in the sums)"
        values["method"] = {"head": said}
        if self.training.fit_head_steps:
            self.fitting = _Fit(sum(int(counts.sum()) >= LEAST for counts in told.values()), sums)
            values[UNFINISHED] = SCALE_HEAD
        return State({**state.tensors, **fitted}, {**server, **told}, values)

    def _finished(self, state: State, note: str) -> State:
        self.fitting = None
        values = {key: value for key, value in state.values.items() if key != UNFINISHED}
        if note:
            values["method"] = {"head": f"{values['method']['head']}; {note}"}
        return State(state.tensors, state.server, values)

    def label_counts(self, task: TrainTask) -> tuple[int, ...] | None:
        """What a task says of the labels of all clients; None before the head was first fitted.

        Raises:
            UpdateError: they are not counts of these labels.
        """
        counts = task.label_counts
        if counts is None:
            return None
        if (
            not isinstance(counts, tuple)
            or len(counts) != self.layer.out_features
            or any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
        ):
            raise UpdateError(
                f"{LABEL_COUNTS} {counts!r}: must be {self.layer.out_features} whole numbers from 0"
            )
        return counts

    def discriminant(self, sums: Sums) -> Tensors:
        """The last layer's weight and bias as the linear discriminant of the sums.

        Raises:
            AggregationError: no head comes of these sums.
        """
        number, width = float(sums.sent.sum()), len(sums.scatter)
        means, within = class_moments(sums.sent, sums.totals, sums.scatter)
        centre = sums.totals.sum(dim=0) / number
        squares = float(sums.scatter.diagonal().mean()) / number
        within = shrunk(within, max(1.0, number - int((sums.sent > 0).sum())))
        within += LEAST_SHARE * squares * torch.eye(width, dtype=torch.float64)
        shares = (sums.counts + COUNT) / (float(sums.counts.sum()) + COUNT * len(sums.counts))
        try:
            weight, bias = discriminant(means, within, shares)
            base_weight, base_bias = discriminant(centre[None], within, torch.ones(1, dtype=torch.float64))
        except RuntimeError as error:
            raise AggregationError(f"no head fits the clients' sums: {error}") from None
        fitted = {self.weight: (weight - base_weight).float(), self.bias: (bias - base_bias).float()}
        if not is_finite(fitted):
            raise AggregationError("the head fitted to the clients' sums is not finite: a sum was too large")
        return fitted

    def _logistic(self, sums: Sums) -> LogisticFit:
        """The fit that follows; its gradients are of all examples, not only of those in the sums."""
        classes, width = self.layer.out_features, self.layer.in_features
        examples = float(sums.counts.sum())
        more = examples / float(sums.sent.sum())
        return LogisticFit(
            torch.zeros(classes, width + 1),
            more * sums.scatter,
            more * sums.totals.sum(dim=0),
            examples,
            c=self.training.fit_head_c,
            steps=self.training.fit_head_steps,
        )

    def _head(self, point: Tensor) -> Tensors:
        return {self.weight: point[:, :-1].float(), self.bias: point[:, -1].float()}


def as_if_fitted(state: State, labels: list[int]) -> State:
    """The state as if a head had been fitted to these numbers of examples of each label; for estimates of
    message lengths.
    """
    return replace(state, values={**state.values, LABEL_COUNTS: labels})


def without_label_counts(values: Values) -> Values:
    """A state's values but for the clients' label counts, which an evaluation does not need."""
    return {key: value for key, value in values.items() if key != LABEL_COUNTS}


def client_labels(state: State) -> dict[str, list[int]]:
    """How many examples of each label the clients have that answered when a head was fitted."""
    return {name: counts.tolist() for name, counts in part(state.server, CLIENT_LABELS).items()}


def output_names(trainable: TrainableModel, base: Base) -> frozenset[str]:
    """The names by which weight and, where there is one, bias of a head's last linear layer travel; none
    where the head does not end in one.
    """
    found = _output(trainable, base)
    return frozenset(found[1]) if found else frozenset()


def last_layer(trainable: TrainableModel, base: Base) -> tuple[nn.Linear, str, str]:
    """The head's last layer, and the names by which its weight and bias travel.

    Raises:
        RecipeError: the head has no such layer with a bias.
    """
    found = _output(trainable, base)
    if found is None or len(found[1]) != 2:
        raise RecipeError(
            f"training.fit_head_rounds: the head of {base.name} does not end in a layer with a bias"
        )
    return found[0], found[1][0], found[1][1]


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
