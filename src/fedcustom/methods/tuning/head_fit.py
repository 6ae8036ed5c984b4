"""Head fitting at the server: the classification head from sums and gradients over frozen vectors."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...aggregation.logistic import LogisticFit
from ...core.tensors import Tensors, is_finite, part
from ...privacy.settings import PrivacySettings
from ...training.settings import TrainingSettings
from ..messages import Task, Update, typed
from ..protocol import UNFINISHED, Aggregate, Answer, State, Values, peeked
from .head_layer import HeadLayer
from .head_messages import (
    FIT_HEAD,
    HEAD_GRADIENT,
    POINT,
    SCALE_HEAD,
    TEMPERATURES,
    Sums,
    check_answer,
    check_private_sums,
    has_scatter,
)
from .head_solution import discriminant_head, head_of, logistic_fit, private_head, with_shares
from .messages import (
    FitHeadTask,
    HeadGradientTask,
    HeadGradientUpdate,
    HeadSumsUpdate,
    ScaleHeadTask,
)
from .release import ClientRelease
from .update_checks import check_forms

LABEL_COUNTS = "label_counts"
"""The value of a state, and of a task, that says how many examples of each label all have who were asked."""

CLIENT_LABELS = "client_labels/"
"""Before a client's name: what the server keeps of how many examples of each label it has, (labels,)."""


@dataclass
class _Fit:
    """A fit under way at the server: how many examples of each label each client has in its sums, these sums,
    what to report of them, and the clients that send no gradients.
    """

    counted: dict[str, Tensor]
    sums: Sums
    said: str
    logistic: LogisticFit | None = None
    silent: set[str] = field(default_factory=set)

    def labels(self, names: Iterable[str]) -> Tensor:
        """How many examples of each label these clients have in their sums together."""
        return sum((self.counted[name].double() for name in names), torch.zeros_like(self.sums.sent))


class HeadFit:
    """The last layer of a head on vectors x that do not change while it is fitted (a linear probe).

    First each client sends sums: for each label the number of its examples and, where it has at least
    ``least`` different texts of it (``training.fit_head_least_texts``), sum x; and over those the triangular
    factor R of sum x x^T = R^T R, which has no more rows than there are examples. A client with few texts
    sends no R: each of its sums then counts as one example in the covariance
    (:func:`~fedcustom.aggregation.discriminant.class_moments`). They add up to a linear discriminant, whose
    covariance is shrunk by :func:`~fedcustom.aggregation.discriminant.shrunk`, less the discriminant of the
    mean of all examples, which changes no prediction and keeps weights small. Then, in
    ``training.fit_head_steps`` further exchanges of the same round, clients send the loss of that head at
    several temperatures, and losses and gradients from which the server finds the logistic regression of the
    same examples (:class:`~fedcustom.aggregation.logistic.LogisticFit`); it is kept only where gradients came
    of at least half of them. No text passes through the model again: a client keeps its vectors until the
    round is over. Label skew makes no difference, since all of it adds up; each example counts as one,
    whatever ``aggregation.weighting`` says. Of labels that were partly withheld either head has the shares
    of all examples, by Bayes' rule. Which of the two heads is kept is decided on the development split. Sums
    for a closed form are those of Fed3R (Fani et al. 2024); a head fitted before training against label skew
    is Legate et al. 2023 (FedNCM).

    Where fewer than half of the examples are in the sums, or a label that clients have is not, the fit is
    only a beginning: the head is trained with the rest from then on.

    With ``training.fit_head_clients`` it is fitted to so many clients, drawn at random. A fit to few clients
    would be no fit to all: where fewer than half of the ``clients`` that are asked answer, the head stays as
    it was.

    Where clients are hidden from whoever sees the states (``privacy.unit = "client"``), there is one
    exchange: each client sends counts and sums of its vectors, divided by their lengths, and the trusted
    server adds noise to what they add up to. Where clients hide their rows (``"example"``), each adds noise
    to its own counts and sums, and withholds nothing besides.

    Discloses: what is named above. The rules of :mod:`~.head_disclosure` are applied by the client: examples
    of a label with few texts enter nothing but the label's count, so no difference of what is sent has them;
    in no sum and no row of a gradient, nor in the difference of two that are sent, has a text more than one
    part in ``least`` of the weight. This is a heuristic and no differential privacy. It does not keep a
    server that has a candidate text from testing whether it is in a sum: sums of up to about ten texts can
    be taken apart among candidates, and a candidate in the span of R, or of several gradients, of a client
    with fewer texts than ``width`` is one of its texts. Nor does it keep it from combining three and more
    answers about the same texts into equations for them. That needs secure sums or differential privacy.
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
        least: int = 1,
        privacy: PrivacySettings | None = None,
        release: ClientRelease | None = None,
        hides_rows: bool = False,
        sent: bool = True,
        owners: int = 1,
    ) -> None:
        self.owners = owners
        self.sent = sent
        self.training, self.clients, self.least = training, clients, least
        self.privacy, self.release, self.hides_rows = privacy, release, hides_rows
        self.names: frozenset[str] = frozenset()
        self.fitting: _Fit | None = None
        if layer is not None:
            self.layer, self.names = layer, layer.names

    @property
    def noised(self) -> bool:
        """Whether the head is fitted to noised sums, in one exchange."""
        return self.privacy is not None or self.hides_rows

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """What is asked after the first exchange of a round; nothing of clients that withheld everything."""
        fitting = self.fitting
        assert fitting is not None
        kind = str(state.values[UNFINISHED])
        fit = fitting.logistic
        if kind == HEAD_GRADIENT and fit is not None:
            point = fit.point.float()
        else:
            point = torch.cat(
                [state.tensors[self.layer.weight], state.tensors[self.layer.bias][:, None]], dim=1
            )
        some = [name for name in names if name in fitting.counted and name not in fitting.silent]
        asked = HeadGradientTask if kind == HEAD_GRADIENT else ScaleHeadTask
        return {name: asked({POINT: point}, round_number=round_number) for name in some}

    def may_step(self, examples: int) -> bool:
        """Whether a client with so many examples in its sums may send gradients of them
        (:func:`~.head_disclosure.sends_gradient`).
        """
        return examples >= (self.least * self.layer.classes if self.least > 1 else 1)

    def check(self, task: Task, update: Update) -> None:
        """Refuse what cannot be an answer to a task about the head; or any, unless they are to be sent.

        Raises:
            UpdateError: says what is wrong.
        """
        if self.sent and self.noised:
            check_private_sums(update, self.layer.classes, self.layer.width, noised=self.hides_rows)
        elif self.sent:
            check_answer(task, update, self.layer.classes, self.layer.width)
        else:
            check_forms(update.tensors, {})

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after one exchange of a round that fits the head; :data:`UNFINISHED` in its values says
        what is asked next, if anything is. The first one holds the discriminant, the last one the logistic
        regression.
        """
        if kind == FIT_HEAD:
            if self.hides_rows:
                return self._added(state, answers)
            return self._begin(state, answers) if self.privacy is None else self._noised(state, answers)
        assert self.fitting is not None
        fitting = self.fitting
        silent = set(fitting.silent)
        loss, answered = 0.0, list[str]()
        tensor: Tensor | None = None
        for answer in answers:
            update = answer.update
            (sent,) = update.tensors.values()
            tensor = sent.double() if tensor is None else tensor + sent.double()
            answered.append(answer.client)
            if not update.weight:
                fitting.silent.add(answer.client)
            loss += update.objective if isinstance(update, HeadGradientUpdate) else 0.0
        clients, went_on = len(fitting.counted), len(silent) + len(answered)
        if tensor is None or 2 * went_on < clients:
            note = f"{went_on} of {clients} clients went on; kept the discriminant"
            return self._finished(state, fitting, note)
        if kind == SCALE_HEAD:
            scale = TEMPERATURES[int(tensor.argmin())]
            head = {name: scale * state.tensors[name] for name in self.names}
            following = State({**state.tensors, **head}, state.server, state.values)
            fitting.silent = {
                name for name, counted in fitting.counted.items() if not self.may_step(int(counted.sum()))
            }
            if note := self._too_little(fitting, set(fitting.counted) - fitting.silent):
                return self._finished(following, fitting, note)
            fitting.logistic = logistic_fit(self.layer, fitting.sums, self.training)
            following = replace(following, values={**state.values, UNFINISHED: HEAD_GRADIENT})
            return Aggregate(following, {"head": fitting.said})
        fit = fitting.logistic
        assert fit is not None
        heard = set(answered) - fitting.silent
        if note := self._too_little(fitting, heard):
            return self._finished(state, fitting, note)
        labels = fitting.labels(heard)  # as they said at first
        fit.tell(loss, tensor, float(labels.sum()))
        if not fit.done:
            return Aggregate(state, {"head": fitting.said})
        head = with_shares(self.layer, head_of(self.layer, fit.best), labels, fitting.sums.counts)
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
        counted: dict[str, Tensor] = {}
        sums = Sums.zero(self.layer.classes, self.layer.width)
        withholding = unscattered = 0
        for answer in answers:
            tensors = answer.update.tensors
            told[CLIENT_LABELS + answer.client] = tensors["counts"].long()
            sums.add(tensors)
            withholding += bool((tensors["counted"] < tensors["counts"]).any())
            if tensors["counted"].any():
                counted[answer.client] = tensors["counted"].long()
                unscattered += not has_scatter(tensors)
        if 2 * len(told) < self.clients:
            kept = f"not fitted: {len(told)} of {self.clients} clients answered"
            return Aggregate(replace(state, server={**state.server, **told}), {"head": kept})
        number, sent = int(sums.counts.sum()), int(sums.sent.sum())
        withheld = self._withheld(sums, withholding) if sent < number else ""
        present = int((sums.sent > 0).sum())
        if not sent or (unscattered and sums.pieces < 2 * present):
            kept = f"not fitted: {withheld or 'no sums'}"
            if sent:
                kept += f"; {sent} examples of {len(counted)} clients are too few"
            return Aggregate(replace(state, server={**state.server, **told}), {"head": kept})
        fitted = discriminant_head(self.layer, sums)
        server = at_rest(state.server, self.names)
        values = {key: value for key, value in state.values.items() if key != LABEL_COUNTS}
        said = f"fitted to {number} examples of {len(told)} clients"
        if withheld:
            said = f"fitted to {sent} of {number} examples of {len(told)} clients ({withheld})"
        if unscattered:
            said += f"; {unscattered} clients with few texts sent no second moments"
        if not fits_fully(sums.counts, sums.sent):
            said += "; the head is trained further, as of these too much is withheld"
        else:
            values[LABEL_COUNTS] = torch.stack(list(told.values())).sum(dim=0).tolist()
        if self.training.fit_head_steps:
            self.fitting = _Fit(counted, sums, said)
            values[UNFINISHED] = SCALE_HEAD
        return Aggregate(State({**state.tensors, **fitted}, {**server, **told}, values), {"head": said})

    def _withheld(self, sums: Sums, clients: int) -> str:
        """What is withheld, in words; ``clients`` withhold any."""
        number, sent = int(sums.counts.sum()), int(sums.sent.sum())
        said = (
            f"labels of {clients} clients with fewer than {self.least} texts withheld: "
            f"{number - sent} of {number} rows"
        )
        if missing := int(((sums.counts > 0) & (sums.sent == 0)).sum()):
            said += f", among them all of {missing} of {int((sums.counts > 0).sum())} labels"
        return said

    def _too_little(self, fitting: _Fit, heard: Iterable[str]) -> str:
        """Why there is no logistic regression, where gradients come of fewer than half of the examples."""
        some, of = int(fitting.labels(heard).sum()), int(fitting.sums.sent.sum())
        if 2 * some >= of:
            return ""
        return (
            f"gradients came of {some} of {of} examples only, since clients send none in which one text "
            "would stand out; kept the discriminant"
        )

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
        return self._with_noised(state, found, deviation, answered)

    def _added(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state with a head of the sum of what clients noised themselves, which hides each row. Where
        fewer than half of those asked answered, the head is as it was.
        """
        layer, answered, variance = self.layer, 0, 0.0
        found = {
            "counts": torch.zeros(layer.classes, dtype=torch.float64),
            "totals": torch.zeros(layer.classes, layer.width, dtype=torch.float64),
        }
        for answer in answers:
            answered += 1
            variance += (typed(answer.update, HeadSumsUpdate).deviation or 0.0) ** 2
            for name, total in found.items():
                total += answer.update.tensors[name]
        if 2 * answered < self.clients:
            return Aggregate(state, {"head": f"not fitted: {answered} of {self.clients} clients answered"})
        return self._with_noised(state, found, math.sqrt(variance), answered)

    def _with_noised(self, state: State, sums: Tensors, deviation: float, answered: int) -> Aggregate:
        """The state with the head of noised sums of so many clients, with noise of this deviation."""
        fitted = private_head(self.layer, sums["counts"], sums["totals"], deviation)
        counts = [max(0, round(count)) for count in sums["counts"].tolist()]
        server = at_rest(state.server, self.names)
        said = f"fitted to noised sums of {answered} clients, about {sum(counts)} examples"
        values = {**state.values, LABEL_COUNTS: counts}
        return Aggregate(State({**state.tensors, **fitted}, server, values), {"head": said})

    def _finished(self, state: State, fitting: _Fit, note: str = "") -> Aggregate:
        self.fitting = None
        values = {key: value for key, value in state.values.items() if key != UNFINISHED}
        said = f"{fitting.said}; {note}" if note else fitting.said
        return Aggregate(replace(state, values=values), {"head": said})


def fits_fully(counts: Tensor, counted: Tensor) -> bool:
    """Whether a fit is more than a beginning: half of the examples of those asked are in it, and all labels
    that they have. ``counts`` and ``counted`` of (labels,) are of all examples, and of those in the sums.
    """
    return bool(2 * counted.sum() >= counts.sum()) and not bool(((counts > 0) & (counted == 0)).any())


def at_rest(server: Tensors, names: Container[str]) -> Tensors:
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
