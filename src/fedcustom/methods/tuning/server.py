"""The server's side of methods that train tensors: the first state, a round's tasks, checks, aggregation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ...aggregation.combine import Change, combine
from ...aggregation.settings import AggregationSettings
from ...core.errors import RecipeError, UpdateError
from ...core.tensors import Tensors, is_finite, without
from ...data.examples import ClientData
from ...training.local import schedule_factor
from ..messages import Task, Update, Work, typed
from ..protocol import UNFINISHED, Aggregate, AggregateContext, Answer, Client, State, peeked
from .aggregation_hooks import AggregationHooks, ClientDelta, RoundAggregator
from .drift_corrections import CONTROL
from .further_exchange import ServerExchange
from .head_fit import LABEL_COUNTS, HeadFit
from .messages import (
    HEAD_KINDS,
    CountLabelsTask,
    FitHeadTask,
    HeadTask,
    SumNoisedTask,
    TrainTask,
    TrainUpdate,
)
from .parts import RATE_FACTOR, TuningParts
from .release import OwnNoise
from .technique import TrainableModel
from .update_checks import check_figures, check_forms

ROOT = "(server)"
"""The name under which the server trains for itself."""


class TuningServer:
    """What the server does of a method that trains tensors. ``train`` does a task on a client's data; the
    server uses it for examples of its own, where the aggregation rule asks for such (FLTrust).
    """

    def __init__(
        self, parts: TuningParts, head_fit: HeadFit, train: Callable[[Task, Client], Update]
    ) -> None:
        self.parts, self.head_fit, self.train = parts, head_fit, train
        self.exchanges: dict[str, ServerExchange] = dict.fromkeys(HEAD_KINDS, head_fit)
        if (further := parts.further) is not None:
            self.exchanges |= dict.fromkeys(further.messages, further)

    def initialise(self) -> State:
        """The tensors as the technique initialises them."""
        parts = self.parts
        tensors = parts.hooks.initialise(parts.trainable.read())
        return State(tensors, parts.correction.initialise(parts.ownership.travelling(tensors)))

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Train from the global state, for as long as ``work`` says (``epochs``, ``steps`` or ``examples``);
        or send what the head is fitted from; or, in a round that is not over, what is asked next.
        """
        parts, context = self.parts, self.parts.context
        factor = schedule_factor(context.training, round_number, context.rounds)
        factor *= float(state.values.get(RATE_FACTOR, 1.0))
        if UNFINISHED in state.values:
            return self.exchanges[str(state.values[UNFINISHED])].tasks(state, work, round_number)
        label_counts: tuple[int, ...] | None = None
        head_unfitted = False
        due = min(parts.head_rounds, default=round_number) < round_number
        if LABEL_COUNTS in state.values:
            if context.training.logit_adjustment:
                label_counts = tuple(state.values[LABEL_COUNTS])
        elif due and context.keeps != "everything":
            head_unfitted = True
        tasks: dict[str, Task] = {}
        for name, amount in work.items():
            tensors: Tensors = {}
            if context.keeps != "everything":
                tensors = parts.ownership.travelling(parts.hooks.down(state.tensors, name, round_number))
                tensors |= {n: t for n, t in state.server.items() if n.startswith(CONTROL)}
            if round_number in parts.head_rounds:
                asked = FitHeadTask
                if context.sums_only:
                    asked = CountLabelsTask if context.row_privacy is None else SumNoisedTask
                tasks[name] = asked(
                    tensors, round_number=round_number, learning_rate_factor=factor, work=amount
                )
            else:
                tasks[name] = TrainTask(
                    tensors,
                    round_number=round_number,
                    learning_rate_factor=factor,
                    work=amount,
                    label_counts=label_counts,
                    head_unfitted=head_unfitted,
                )
        return tasks

    def check(self, task: Task, update: Update) -> None:
        """Refuse other names, shapes or dtypes than were asked for, numbers that are not finite, weights and
        steps that are not positive.
        """
        parts = self.parts
        if (exchange := self.exchanges.get(task.kind)) is not None:
            exchange.check(task, update)
            return
        if not is_finite(update.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        asked, trained = typed(task, TrainTask), typed(update, TrainUpdate)
        wanted = parts.ownership.wanted(asked)
        change = parts.hooks.unpack(trained, wanted)
        check_forms(change, parts.hooks.forms(wanted, asked))
        hides_rows, hides = parts.context.row_privacy is not None, parts.context.own_noise is not None
        size = parts.context.training.batch_size
        check_figures(asked, trained, size, hides_rows=hides_rows, hides_loss=hides_rows or hides)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """One change for the cohort by the recipe's rule or the method's own, then the server optimiser, or
        the head that the clients' sums give; where clients keep everything, nothing is merged.
        """
        if self.parts.context.keeps == "everything":
            for _ in answers:
                pass
            return Aggregate(state)
        if UNFINISHED in state.values:  # of whose clients none may have gone on
            kind = str(state.values[UNFINISHED])
            return self.exchanges[kind].aggregate(kind, state, answers)
        if self.parts.head_rounds:
            task, answers = peeked(answers)
            if isinstance(task, HeadTask):
                return self.head_fit.aggregate(task.kind, state, answers)
        if (privacy := self.parts.context.privacy) is not None:
            if privacy.place == "server":
                return self._released(state, answers)
            return self._noised(state, answers)
        return self._merged(state, answers)

    def _merged(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after a round that trains."""
        parts = self.parts
        settings = parts.aggregation
        # What hooks report is of single clients' changes, which a sum has not, unless a sum is all they need.
        alone = parts.context.sums_only and not parts.hooks.linear
        gathered = RoundAggregator() if alone else parts.hooks.round(state)
        answered: list[str] = []
        newest = 0

        def changes() -> Iterator[Change]:
            nonlocal newest
            for answer in stream:
                arrival = self._arrival(answer)
                answered.extend(answer.clients)
                newest = max(newest, typed(answer.task, TrainTask).round_number)
                rest = gathered.take(arrival)
                yield Change(answer.client, rest, arrival.weight, arrival.update.steps, answer.discount)
                del answer, arrival, rest  # before the next one is made

        stream, root = iter(answers), None
        if settings.rule == "fltrust":
            first, stream = peeked(stream)
            assert first is not None
            root = gathered.take(self._root(state, typed(first, TrainTask)))
        change = combine(changes(), settings, root=root, inner_products=gathered.inner_products)
        return self._stepped(state, change, gathered, newest, answered)

    def _released(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after a round whose mean change is noised, so that no client is told apart.

        Raises:
            RuntimeError: there is no key to draw the noise from, so that nothing may be released.
        """
        parts, context = self.parts, self.parts.context
        if (release := context.release) is None:
            raise RuntimeError("privacy.unit = 'client': this party has no key to draw the noise from")
        first, stream = peeked(iter(answers))
        assert first is not None
        task = typed(first, TrainTask)
        answered: list[str] = []

        def changes() -> Iterator[Tensors]:
            for answer in stream:
                answered.append(answer.client)
                yield self._arrival(answer).change
                del answer

        travelling = released_tensors(parts, state.tensors)
        change, bounds = release.mean(
            changes(),
            state,
            travelling=travelling,
            trained=parts.ownership.wanted(task).keys(),
            head=parts.trainable.head,
            round_number=task.round_number,
            factor=schedule_factor(context.training, task.round_number, context.rounds),
        )
        state = replace(state, values={**state.values, **bounds})
        return self._stepped(state, change, RoundAggregator(), task.round_number, answered)

    def _noised(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state after a round whose clients have noised what they sent, in part before it was summed:
        then their sum is one answer.

        Raises:
            RuntimeError: what came is a client's own change, without enough noise.
        """
        if (noise := self.parts.context.own_noise) is not None:
            return self._with_own_noise(noise, state, answers)
        found = list(answers)
        if len(found) != 1 or not found[0].summed:
            raise RuntimeError("privacy.noise = 'sum': changes came that are no noised sum")
        (answer,) = found
        change, number = self._arrival(answer).change, typed(answer.task, TrainTask).round_number
        return self._stepped(state, dict(change), RoundAggregator(), number, answer.clients)

    def _with_own_noise(self, noise: OwnNoise, state: State, answers: Iterable[Answer]) -> Aggregate:
        answered, newest = list[str](), 0

        def changes() -> Iterator[Mapping[str, Tensor]]:
            nonlocal newest
            for answer in answers:
                answered.append(answer.client)
                newest = typed(answer.task, TrainTask).round_number
                yield self._arrival(answer).change
                del answer

        change = noise.mean(changes())
        return self._stepped(state, change, RoundAggregator(), newest, answered)

    def _stepped(
        self,
        state: State,
        change: Tensors,
        gathered: RoundAggregator,
        round_number: int,
        answered: Sequence[str],
    ) -> Aggregate:
        """The state after the server has followed the cohort's change, and after the method's own rules."""
        parts = self.parts
        for transform in parts.context.transforms:
            change = transform.on_aggregate(change, AggregateContext(round_number, tuple(answered)))
        current = {name: state.tensors[name] for name in change if name in state.tensors}
        relevant = {n: t for n, t in state.server.items() if n.partition("/")[2] in change}
        tensors, kept = parts.correction.step(current, change, relevant, len(answered))
        own, report = gathered.merged({**state.tensors, **tensors})
        following = State({**state.tensors, **tensors, **own}, {**state.server, **kept}, dict(state.values))
        return gathered.ended(following, report)

    def _arrival(self, answer: Answer) -> ClientDelta:
        parts = self.parts
        update = typed(answer.update, TrainUpdate)
        task = typed(answer.task, TrainTask)
        change = parts.hooks.unpack(update, parts.ownership.wanted(task))
        weight = update.weight if parts.aggregation.weighting == "examples" else 1.0
        sent = without(task.tensors, CONTROL)
        change = parts.hooks.to_state(change, sent)
        return ClientDelta(answer.client, sent, change, weight, update, answer.discount, task.round_number)

    def _root(self, state: State, task: TrainTask) -> ClientDelta:
        """What the server's own examples would change (FLTrust)."""
        training = self.parts.context.training
        amount = Work(epochs=training.local_epochs)
        if training.local_steps is not None:
            amount = Work(steps=training.local_steps)
        (own,) = self.configure(state, task.round_number, {ROOT: amount}).values()
        client = Client(ROOT, ClientData(ROOT, self.parts.context.root))
        return replace(self._arrival(Answer(ROOT, own, self.train(own, client))), weight=0.0)


def released_tensors(parts: TuningParts, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors that are noised where clients are hidden: all that travel and are trained in some round."""
    rounds = range(1, parts.context.rounds + 1)
    travelling = {
        name: tensor
        for name, tensor in parts.ownership.travelling(dict(tensors)).items()
        if any(parts.hooks.trains(name, number) for number in rounds)
    }
    if (parts.context.training.freeze_head_rounds or 0) >= parts.context.rounds:
        return {n: t for n, t in travelling.items() if n not in parts.trainable.head}
    return travelling


def check_rule(aggregation: AggregationSettings, hooks: AggregationHooks, trainable: TrainableModel) -> None:
    """Refuse an aggregation rule or a correction that does not go with the method's tensors.

    Raises:
        RecipeError: names the setting.
    """
    if aggregation.correction != "none" and not trainable.corrects:
        raise RecipeError(
            f"aggregation.correction = {aggregation.correction!r}: does not fit tensors that a network "
            "gives anew in each round; train them without one"
        )
    if aggregation.correction != "none" and hooks.turns:
        raise RecipeError(
            f"aggregation.correction = {aggregation.correction!r}: clients would remember gradients in "
            f"coordinates that {hooks.turns} changes in each round; use 'none'"
        )
    for key in ("rule", "correction", "server_optimizer", "server_learning_rate"):
        default = AggregationSettings.model_fields[key].default
        if hooks.own_rule and getattr(aggregation, key) != default:
            raise RecipeError(
                f"aggregation.{key} = {getattr(aggregation, key)!r}: {hooks.own_rule} is a rule of its own; "
                f"leave {key} at {default!r}"
            )
