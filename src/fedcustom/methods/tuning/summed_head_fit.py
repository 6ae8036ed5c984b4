"""Head fitting at a server that is shown sums over clients alone (secure sums)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...aggregation.logistic import LogisticFit
from ...core.errors import AggregationError, UpdateError
from ...core.tensors import is_finite
from ..messages import Task, Update
from ..protocol import UNFINISHED, Aggregate, Answer, FigureForm, State
from .head_fit import LABEL_COUNTS, HeadFit, at_rest, fits_fully
from .head_messages import POINT, TEMPERATURES, Sums, check_moments, unpacked
from .head_solution import discriminant_head, head_of, logistic_fit, with_shares
from .messages import CountLabelsTask, SumGradientsTask, SumLossesTask, SumNoisedTask, SumVectorsTask
from .summed_head import LabelTotals, check_figures, figure_forms, spread_labels


@dataclass
class _Fit:
    """A fit under way: what all clients have of each label, how many clients these are, and what came of it
    so far.
    """

    counts: Tensor
    totals: LabelTotals
    clients: int
    sums: Sums | None = None
    said: str = ""
    logistic: LogisticFit | None = None
    step: int = 0

    @property
    def examples(self) -> int:
        """How many take part."""
        return int(self.sums.sent.sum()) if self.sums is not None else 0


class SummedHeadFit(HeadFit):
    """:class:`~.head_fit.HeadFit` from secure sums: of each exchange the server is shown the sum over all
    clients, in fixed point of 64 bits, and no client's own figures.

    The first exchange counts: how many examples of each label all clients have, how many clients have any,
    and the most that one of these asks all to have. The server tells these totals, and all clients leave out
    the labels that are too rare: of fewer than ``owners`` clients, or of so few examples that one client's
    most frequent text would be more than one in ``least`` of them. The second exchange sums the vectors of
    the other labels and their second moments, those after it losses and gradients. All are of the same
    clients; where one is lost after the first exchange, no further sum is opened. Where that is the second,
    the round comes to nothing; where it is a later one, what was fitted before it stays. Where clients hide
    their rows, there is one exchange, of sums that each noises itself.

    Discloses: the totals of labels; for each label that is common enough the sum of all clients' vectors; the
    second moments of all of them; and up to ``training.fit_head_steps`` gradients of them. Nothing of this is
    one client's own. Two clients' copies of a text count as two texts. That labels are left out rests on the
    totals that the server tells: one that lies about them, or that chooses heads at which a single text has
    most of the weight, can have a single text summed. Against that there is a site's own minimum
    (:class:`~.summed_head.SumTerms`) and differential privacy.
    """

    def forms(self, task: Task) -> dict[str, FigureForm] | None:
        """The forms of what answers a task (:func:`~.summed_head.figure_forms`)."""
        return figure_forms(task, self.layer.classes, self.layer.width, self.owners)

    def check(self, task: Task, update: Update) -> None:
        """Refuse what has not the forms of an answer; of one client, or of all together.

        Raises:
            UpdateError: says what is wrong.
        """
        forms = self.forms(task)
        if forms is None:
            raise UpdateError(f"the task {task.kind!r} is none of a run with secure sums")
        check_figures(update, forms)

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """What is asked of all clients after the first exchange."""
        fit, kind = self._under_way(), str(state.values[UNFINISHED])
        task: Task
        if kind == SumVectorsTask.kind:
            totals = fit.totals
            task = SumVectorsTask(
                round_number=round_number, counted=totals.counted, needed=totals.needed, owners=totals.owners
            )
        elif kind == SumLossesTask.kind:
            head = [state.tensors[self.layer.weight], state.tensors[self.layer.bias][:, None]]
            task = SumLossesTask(
                {POINT: torch.cat(head, dim=1)}, round_number=round_number, examples=fit.examples
            )
        else:
            assert fit.logistic is not None
            task = SumGradientsTask(
                {POINT: fit.logistic.point.float()},
                round_number=round_number,
                examples=fit.examples,
                step=fit.step + 1,
            )
        return dict.fromkeys(names, task)

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after one exchange of a round that fits the head.

        Raises:
            AggregationError: nobody's vectors were summed.
            UpdateError: what came is no sum of such figures.
        """
        found = list(answers)
        if len(found) > 1 or any(not answer.summed for answer in found):
            raise UpdateError("figures of single clients came in place of their sum")
        answer = found[0] if found else None
        if answer is not None:
            self.check(answer.task, answer.update)
        if kind == SumNoisedTask.kind:
            return self._of_noised(state, answer)
        if kind == CountLabelsTask.kind:
            return self._counted(state, answer)
        if kind == SumVectorsTask.kind:
            if answer is None:
                raise AggregationError(
                    "the clients' vectors were not summed: not all that counted their labels answered"
                )
            return self._summed(state, answer)
        if answer is None:
            return self._ended(state, "not all clients went on; kept what was fitted before")
        return self._scaled(state, answer) if kind == SumLossesTask.kind else self._stepped(state, answer)

    # --- the exchanges ---

    def _of_noised(self, state: State, answer: Answer | None) -> Aggregate:
        """The state with a head of sums that clients noised themselves, which hides each row."""
        clients = len(answer.clients) if answer is not None else 0
        if answer is None or 2 * clients < self.clients:
            return Aggregate(state, {"head": f"not fitted: {clients} of {self.clients} clients answered"})
        sums = dict(answer.update.tensors)
        variance = float(sums.pop("variance"))
        if not variance > 0:
            raise UpdateError(f"noise with a variance of {variance:g}: must be above 0")
        return self._with_noised(state, sums, math.sqrt(variance), clients)

    def _counted(self, state: State, answer: Answer | None) -> Aggregate:
        """The state, which waits for sums of the labels that are common enough, if there are any."""
        self._fit = None
        if answer is None:
            return Aggregate(state, {"head": f"not fitted: none of {self.clients} clients was counted"})
        tensors, clients = answer.update.tensors, len(answer.clients)
        counts, counted, repeats = tensors["counts"], tensors["counted"], tensors["repeats"]
        if int(counts.sum()) != round(answer.update.weight) or (counted > counts).any():
            raise UpdateError("the sums of labels are not those of the examples that clients have")
        if (repeats.sum(dim=1) > clients).any() or ((repeats.sum(dim=1) == 0) != (counted == 0)).any():
            raise UpdateError("the sums of labels are not those of so many clients")
        if 2 * clients < self.clients:
            return Aggregate(state, {"head": f"not fitted: {clients} of {self.clients} clients answered"})
        fit = _Fit(counts.double(), LabelTotals.of(counted, repeats), clients)
        if not fit.totals.examples(self.owners):
            return Aggregate(state, {"head": f"not fitted: {self._left_out(fit)}"})
        self._fit = fit
        values = {**state.values, UNFINISHED: SumVectorsTask.kind}
        return Aggregate(replace(state, values=values), may_end=False)

    def _summed(self, state: State, answer: Answer) -> Aggregate:
        """The state with the discriminant of the sums."""
        fit, layer, tensors = self._under_way(), self.layer, answer.update.tensors
        admitted = fit.totals.admitted(self.owners)
        wanted = torch.tensor(fit.totals.counted) * admitted
        if not torch.equal(tensors["counted"], wanted):
            raise UpdateError("the sum of the clients' vectors has other examples than were counted")
        sent, pieces = wanted.double(), float(tensors["pieces"])
        upper = unpacked(tensors["scatter"], layer.width)
        scatter = upper + upper.T - torch.diag(upper.diagonal())
        totals = spread_labels(tensors["totals"], admitted)
        check_moments(sent, totals, scatter)
        fit.sums = sums = Sums(fit.counts, sent, totals, scatter, pieces)
        number, taken = int(sums.counts.sum()), int(sent.sum())
        fit.said = f"fitted to {number} examples of {fit.clients} clients, of which sums alone are seen"
        if left := self._left_out(fit):
            fit.said = (
                f"fitted to {taken} of {number} examples of {fit.clients} clients, of which sums alone are "
                f"seen ({left})"
            )
        if long := int(tensors["shortened"]):
            fit.said += f"; {long} vectors longer than the fixed point holds were shortened"
        values = {k: v for k, v in state.values.items() if k not in (LABEL_COUNTS, UNFINISHED)}
        present = int((sent > 0).sum())
        if pieces < taken and pieces < 2 * present:
            return self._ended(replace(state, values=values), "too few second moments", fitted=False)
        fitted = discriminant_head(layer, sums)
        if fits_fully(sums.counts, sent):
            values[LABEL_COUNTS] = [int(count) for count in sums.counts.tolist()]
        else:
            fit.said += "; the head is trained further, as of these too much is left out"
        if self.training.fit_head_steps:
            values[UNFINISHED] = SumLossesTask.kind
        tensors = {**state.tensors, **fitted}
        return Aggregate(State(tensors, at_rest(state.server, self.names), values), {"head": fit.said})

    def _scaled(self, state: State, answer: Answer) -> Aggregate:
        """The state whose discriminant has the best temperature."""
        fit, tensors = self._under_way(), answer.update.tensors
        assert fit.sums is not None
        scale = TEMPERATURES[int(tensors["losses"].argmin())]
        head = {name: scale * state.tensors[name] for name in self.names}
        state = replace(state, tensors={**state.tensors, **head})
        if not self.may_step(fit.examples):
            few = f"{fit.examples} examples are too few for gradients of {self.layer.classes} labels"
            return self._ended(state, f"{few}; kept the discriminant")
        fit.logistic = logistic_fit(self.layer, fit.sums, self.training)
        values = {**state.values, UNFINISHED: SumGradientsTask.kind}
        return Aggregate(replace(state, values=values), {"head": fit.said})

    def _stepped(self, state: State, answer: Answer) -> Aggregate:
        """The state with the logistic regression, once it is done."""
        fit, tensors = self._under_way(), answer.update.tensors
        assert fit.logistic is not None
        assert fit.sums is not None
        counted = tensors["counted"].double()
        if (counted > fit.sums.sent).any():
            raise UpdateError("the sum of the clients' gradients has more examples than were counted")
        if 2 * counted.sum() < fit.sums.sent.sum():
            few = f"gradients came of {int(counted.sum())} of {fit.examples} examples only"
            return self._ended(state, f"{few}; kept the discriminant")
        fit.step += 1
        fit.logistic.tell(float(tensors["loss"]), tensors["gradient"], float(counted.sum()))
        if not fit.logistic.done:
            return Aggregate(state, {"head": fit.said})
        head = head_of(self.layer, fit.logistic.best)
        head = with_shares(self.layer, head, counted, fit.sums.counts)
        if not is_finite(head):
            return self._ended(state, "the logistic regression is not finite; kept the discriminant")
        return self._ended(replace(state, tensors={**state.tensors, **head}))

    # --- parts ---

    _fit: _Fit | None = None

    def _under_way(self) -> _Fit:
        if self._fit is None:
            raise UpdateError("no fit of the head is under way")
        return self._fit

    def _left_out(self, fit: _Fit) -> str:
        """Which labels are too rare to take part, in words; empty where none is."""
        admitted, number = fit.totals.admitted(self.owners), int(fit.counts.sum())
        left = number - fit.totals.examples(self.owners)
        if not left:
            return ""
        labels = int(((fit.counts > 0) & ~admitted).sum())
        few = f"labels that fewer than {self.owners} clients have"
        if self.least > 1:
            few += ", or of fewer texts than these ask for,"
        return f"{few} left out: all of {labels} labels, {left} of {number} rows"

    def _ended(self, state: State, note: str = "", *, fitted: bool = True) -> Aggregate:
        fit, self._fit = self._under_way(), None
        values = {key: value for key, value in state.values.items() if key != UNFINISHED}
        said = f"{fit.said}; {note}" if note else fit.said
        return Aggregate(replace(state, values=values), {"head": said if fitted else f"not fitted: {note}"})
