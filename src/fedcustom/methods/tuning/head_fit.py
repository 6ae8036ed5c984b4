"""Head fitting at the server: the classification head from sums and gradients over frozen vectors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...aggregation.logistic import LogisticFit
from ...core.tensors import Tensors, is_finite, part
from ...privacy.settings import PrivacySettings
from ...training.settings import TrainingSettings
from ..protocol import UNFINISHED, Aggregate, Answer, State, Task, Update, Values, peeked, typed
from .head_layer import HeadLayer
from .head_messages import (
    FIT_HEAD,
    HEAD_GRADIENT,
    LEAST,
    POINT,
    SCALE_HEAD,
    TEMPERATURES,
    Sums,
    check_answer,
    check_private_sums,
)
from .head_solution import discriminant_head, head_of, logistic_fit, private_head
from .messages import FitHeadTask, HeadGradientTask, HeadGradientUpdate, ScaleHeadTask
from .release import ClientRelease
from .update_checks import check_forms

LABEL_COUNTS = "label_counts"
"""The value of a state, and of a task, that says how many examples of each label all have who were asked."""

CLIENT_LABELS = "client_labels/"
"""Before a client's name: what the server keeps of how many examples of each label it has, (labels,)."""


@dataclass
class _Fit:
    """A fit under way at the server: the clients that are asked, their sums, and what to report of them."""

    clients: int
    sums: Sums
    said: str
    logistic: LogisticFit | None = None


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

    Where clients are hidden from whoever sees the states (``privacy.unit = "client"``), there is one
    exchange: each client sends counts and sums of its vectors, divided by their lengths, and the trusted
    server adds noise to what they add up to.

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
        layer: HeadLayer | None,
        *,
        clients: int = 1,
        privacy: PrivacySettings | None = None,
        release: ClientRelease | None = None,
    ) -> None:
        self.training, self.clients, self.privacy, self.release = training, clients, privacy, release
        self.names: frozenset[str] = frozenset()
        self.fitting: _Fit | None = None
        if layer is not None:
            self.layer, self.names = layer, layer.names

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """What is asked after the first exchange of a round; nothing of clients with a single example."""
        assert self.fitting is not None
        kind = str(state.values[UNFINISHED])
        fit = self.fitting.logistic
        if kind == HEAD_GRADIENT and fit is not None:
            point = fit.point.float()
        else:
            point = torch.cat(
                [state.tensors[self.layer.weight], state.tensors[self.layer.bias][:, None]], dim=1
            )
        counts = {name: state.server.get(CLIENT_LABELS + name) for name in names}
        some = [name for name, found in counts.items() if found is None or int(found.sum()) >= LEAST]
        asked = HeadGradientTask if kind == HEAD_GRADIENT else ScaleHeadTask
        return {name: asked({POINT: point}, round_number=round_number) for name in some}

    def check(self, task: Task, update: Update, *, sent: bool = True) -> None:
        """Refuse what cannot be an answer to a task about the head; or any, unless they are to be ``sent``.

        Raises:
            UpdateError: says what is wrong.
        """
        if sent and self.privacy is not None:
            check_private_sums(update, self.layer.classes, self.layer.width)
        elif sent:
            check_answer(task, update, self.layer.classes, self.layer.width)
        else:
            check_forms(update.tensors, {})

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after one exchange of a round that fits the head; :data:`UNFINISHED` in its values says
        what is asked next, if anything is. The first one holds the discriminant, the last one the logistic
        regression.
        """
        if kind == FIT_HEAD:
            return self._begin(state, answers) if self.privacy is None else self._noised(state, answers)
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
                state, fitting, f"{answered} of {fitting.clients} clients went on; kept the discriminant"
            )
        if kind == SCALE_HEAD:
            scale = TEMPERATURES[int(tensor.argmin())]
            head = {name: scale * state.tensors[name] for name in self.names}
            fitting.logistic = logistic_fit(self.layer, fitting.sums, self.training)
            values = {**state.values, UNFINISHED: HEAD_GRADIENT}
            following = State({**state.tensors, **head}, state.server, values)
            return Aggregate(following, {"head": fitting.said})
        fit = fitting.logistic
        assert fit is not None
        fit.tell(loss, tensor, examples)
        if not fit.done:
            return Aggregate(state, {"head": fitting.said})
        head = head_of(self.layer, fit.best)
        if not is_finite(head):
            return self._finished(
                state, fitting, "the logistic regression is not finite; kept the discriminant"
            )
        return self._finished(replace(state, tensors={**state.tensors, **head}), fitting)

    def _begin(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state with the discriminant as its head, whose former momentum at the server is gone, and the
        number of examples of each label, of all and of each client that answered. Where fewer than half of
        those asked did, the head is as it was, and their labels alone are noted.
        """
        told: Tensors = {}
        sums = Sums.zero(self.layer.classes, self.layer.width)
        for answer in answers:
            told[CLIENT_LABELS + answer.client] = answer.update.tensors["counts"].long()
            sums.add(answer.update.tensors)
        if 2 * len(told) < self.clients:
            kept = f"not fitted: {len(told)} of {self.clients} clients answered"
            return Aggregate(replace(state, server={**state.server, **told}), {"head": kept})
        if not sums.sent.any():
            kept = "not fitted: no client has two examples of a label"
            return Aggregate(replace(state, server={**state.server, **told}), {"head": kept})
        fitted = discriminant_head(self.layer, sums)
        server = _at_rest(state.server, self.names)
        together = torch.stack(list(told.values())).sum(dim=0).tolist()
        values = {**state.values, LABEL_COUNTS: together}
        number, withheld = int(sums.counts.sum()), int((sums.counts - sums.sent).sum())
        said = f"fitted to {number} examples of {len(told)} clients"
        if withheld:
            said += f" ({withheld} of them, the only ones of their label at a client, not in the sums)"
        if self.training.fit_head_steps:
            self.fitting = _Fit(sum(int(counts.sum()) >= LEAST for counts in told.values()), sums, said)
            values[UNFINISHED] = SCALE_HEAD
        return Aggregate(State({**state.tensors, **fitted}, {**server, **told}, values), {"head": said})

    def _noised(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state with a head of noised counts and sums, in which no client is told apart.

        Raises:
            RuntimeError: there is no key to draw the noise from, so that nothing may be released.
        """
        if self.release is None:
            raise RuntimeError("privacy.unit = 'client': this party has no key to draw the noise from")
        first, stream = peeked(iter(answers))
        assert first is not None
        layer, answered = self.layer, 0

        def sums() -> Iterator[Tensors]:
            nonlocal answered
            for answer in stream:
                answered += 1
                yield answer.update.tensors

        forms = {"counts": torch.empty(layer.classes), "totals": torch.empty(layer.classes, layer.width)}
        number = typed(first, FitHeadTask).round_number
        found, deviation = self.release.head_sums(sums(), forms, number)
        fitted = private_head(layer, found["counts"], found["totals"], deviation)
        counts = [max(0, round(count)) for count in found["counts"].tolist()]
        server = _at_rest(state.server, self.names)
        said = f"fitted to noised sums of {answered} clients, about {sum(counts)} examples"
        values = {**state.values, LABEL_COUNTS: counts}
        return Aggregate(State({**state.tensors, **fitted}, server, values), {"head": said})

    def _finished(self, state: State, fitting: _Fit, note: str = "") -> Aggregate:
        self.fitting = None
        values = {key: value for key, value in state.values.items() if key != UNFINISHED}
        said = f"{fitting.said}; {note}" if note else fitting.said
        return Aggregate(replace(state, values=values), {"head": said})


def _at_rest(server: Tensors, names: Container[str]) -> Tensors:
    """The server's own tensors without the momentum of a head that is replaced."""
    return {
        name: torch.zeros_like(tensor) if name.partition("/")[2] in names else tensor
        for name, tensor in server.items()
    }


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
