"""Weight tuning: the five verbs of every method that trains tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...aggregation.combine import Change, combine
from ...aggregation.settings import AggregationSettings
from ...core.errors import DataError, RecipeError, UpdateError
from ...core.seeds import name_seed
from ...core.tensors import Tensors, count, is_finite, named, part, without, zeros_like
from ...data.examples import ClientData, Example
from ...data.tokens import Batch, TokenizedExample, example_order
from ...models.inference import Predictions, predict
from ...training.label_prior import label_offset
from ...training.local import LocalResult, learning_rate, schedule_factor
from ..protocol import (
    UNFINISHED,
    AggregateContext,
    Answer,
    Client,
    Memory,
    MessagePair,
    Messages,
    State,
    Task,
    Update,
    Work,
    peeked,
    typed,
)
from .aggregation_hooks import BASE_CHANGE, AggregationHooks, ClientDelta
from .drift_corrections import CONTROL, Correction, make_correction
from .export_check import Reference, reference, some
from .head_fit import LABEL_COUNTS, HeadFit, output_names
from .local_training import Job, LocalTraining, batch_ranges
from .messages import MESSAGES, FitHeadTask, HeadSumsUpdate, HeadTask, TrainTask, TrainUpdate
from .objective import Objective, Supervised
from .ownership import Ownership
from .technique import Context, Technique, prepare_precision
from .trial import trial_pass, trial_rows
from .update_checks import check_figures, check_forms, check_state

RATE_FACTOR = "rate_factor"
"""The value of a state by which the recipe's learning rate is multiplied: what a search of rates found."""

ROOT = "(server)"
"""The name under which the server trains for itself."""


class WeightTuning:
    """The verbs of a :class:`~fedcustom.methods.protocol.Method` that trains tensors by backpropagation.

    Discloses: each round, every client sends the change of its trained tensors, its number of training
    examples and its mean training loss. Changes of trained tensors can reveal training data to a server that
    attacks them. In rounds of ``training.fit_head_rounds`` it sends what
    :class:`~fedcustom.methods.tuning.head_fit.HeadFit` says instead.
    """

    def __init__(
        self,
        technique: Technique,
        context: Context,
        objective: Objective | None = None,
        *,
        name: str = "training",
    ) -> None:
        self.context = context
        self.objective = objective or Supervised(context.base, context.data)
        original = list(context.base.model.parameters())
        self.trainable = technique.attach(context.base, context.seed)
        prepare_precision(context.base, original)
        padding = trial_pass(name, self.trainable, self.objective, context.base, context.evaluation)
        self.base = replace(context.base, padding=padding)
        federated = context.keeps == "nothing"
        # A baseline is ordinary training: nothing is merged by rules.
        self.aggregation = context.aggregation if federated else AggregationSettings()
        self.hooks = self.trainable.hooks if federated and self.trainable.hooks else AggregationHooks()
        self.correction = make_correction(self.aggregation, context.clients)
        self._check_rule()
        self.ownership = Ownership(context, self.trainable, self.hooks)
        asked = context.training.clients_of_head_fits(context.clients) if federated else 1
        self.head_fit = HeadFit(
            context.training,
            context.rounds,
            self.trainable,
            self.objective,
            self.base,
            clients=asked,
            batch_size=context.evaluation.batch_size,
        )
        if self.ownership.personal & self.head_fit.names:
            raise RecipeError("training.fit_head_rounds: does not go with a head that stays with the clients")
        self._tokens: dict[int, tuple[list[Example], list[TokenizedExample]]] = {}
        if self.base.compile:
            self.trainable.model.compile(dynamic=True)
        self.local = LocalTraining(
            self.trainable,
            self.objective,
            context.training,
            self.base,
            lambda batch: self._loss(batch),
            trial_rows(self.objective, self.base),
        )

    def remarks(self) -> list[str]:
        """What users should know of how this model trains with this method."""
        found, name = list(self.trainable.remarks), self.base.name
        if self.base.padding == "none":
            found.append(f"{name}: padding changes its results, so that batches hold texts of one length")
        self.widest_cohort()
        if self.local.unshared:
            found.append(
                f"{name}: clients are trained one after another, since in one batch its "
                f"{self.base.model.config.model_type} code does not give what it gives for one client alone "
                f"({self.local.unshared})"
            )
        return found

    @property
    def messages(self) -> Messages:
        """Training, with what the method's hooks answer, and fitting the head."""
        return {**MESSAGES, TrainTask.kind: MessagePair(TrainTask, self.hooks.update)}

    # --- server ---

    def initialise(self) -> State:
        """The tensors as the technique initialises them."""
        tensors = self.hooks.initialise(self.trainable.read())
        return State(tensors, self.correction.initialise(self.ownership.travelling(tensors)))

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Train from the global state, for as long as ``work`` says (``epochs``, ``steps`` or ``examples``);
        or send what the head is fitted from.
        """
        factor = schedule_factor(self.context.training, round_number, self.context.rounds)
        factor *= float(state.values.get(RATE_FACTOR, 1.0))
        if UNFINISHED in state.values:
            return self.head_fit.tasks(state, work, round_number)
        label_counts: tuple[int, ...] | None = None
        head_unfitted = False
        due = min(self.head_fit.rounds, default=round_number) < round_number
        if LABEL_COUNTS in state.values:
            if self.context.training.logit_adjustment:
                label_counts = tuple(state.values[LABEL_COUNTS])
        elif due and self.context.keeps != "everything":
            head_unfitted = True
        tasks: dict[str, Task] = {}
        for name, amount in work.items():
            tensors: Tensors = {}
            if self.context.keeps != "everything":
                tensors = self.ownership.travelling(self.hooks.down(state.tensors, name, round_number))
                tensors |= {n: t for n, t in state.server.items() if n.startswith(CONTROL)}
            if round_number in self.head_fit.rounds:
                tasks[name] = FitHeadTask(
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
        if isinstance(task, HeadTask):
            self.head_fit.check(task, update, sent=self.context.keeps != "everything")
            return
        if not is_finite(update.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        asked, trained = typed(task, TrainTask), typed(update, TrainUpdate)
        wanted = self.ownership.wanted(asked)
        change = self.hooks.unpack(trained, wanted)
        check_forms(change, wanted)
        check_figures(asked, trained, self.context.training.batch_size)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> State:
        """One change for the cohort by the recipe's rule or the method's own, then the server optimiser, or
        the head that the clients' sums give; where clients keep everything, nothing is merged.
        """
        if self.context.keeps == "everything":
            for _ in answers:
                pass
            return state
        if UNFINISHED in state.values:  # of whose clients none may have gone on
            return self.head_fit.aggregate(str(state.values[UNFINISHED]), state, answers)
        if self.head_fit.rounds:
            task, answers = peeked(answers)
            if isinstance(task, HeadTask):
                return self.head_fit.aggregate(task.kind, state, answers)
        settings, gathered = self.aggregation, self.hooks.round(state)
        answered: list[str] = []
        newest = 0

        def changes() -> Iterator[Change]:
            nonlocal newest
            for answer in stream:
                arrival = self._arrival(answer)
                answered.append(answer.client)
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
        for transform in self.context.transforms:
            change = transform.on_aggregate(change, AggregateContext(newest, tuple(answered)))
        current = {name: state.tensors[name] for name in change if name in state.tensors}
        relevant = {n: t for n, t in state.server.items() if n.partition("/")[2] in change}
        tensors, kept = self.correction.step(current, change, relevant, len(answered))
        own, report = gathered.merged({**state.tensors, **tensors})
        values = {key: value for key, value in state.values.items() if key != "method"}
        if report:
            values["method"] = report
        return State({**state.tensors, **tensors, **own}, {**state.server, **kept}, values)

    def scaled(self, state: State, factor: float) -> State | None:
        """The state whose logits are ``factor`` times as large, by the weight and bias of the head's last
        layer; None where there is none, or it stays with the clients.
        """
        names = output_names(self.trainable, self.base)
        if not names or not names <= state.tensors.keys():
            return None
        return replace(state, tensors={n: t * factor if n in names else t for n, t in state.tensors.items()})

    def with_state(self, state: State) -> Any:
        """Put a state into the model, and return that."""
        self.trainable.write(self.ownership.complete(state.tensors))
        return self.trainable.model

    def export(self, state: State, folder: Path) -> None:
        """Write the adapter or model of this state, with its tokenizer."""
        self.with_state(state)
        self.trainable.save(folder)
        self.base.tokenizer.save_pretrained(folder)

    def reference(self, state: State, examples: Sequence[Example]) -> Reference:
        """The outputs of this state's model, for the check of its export."""
        chosen = some(examples)
        return reference(self.with_state(state), self.base, chosen, self.tokens(chosen))

    def open(self, folder: Path) -> State:
        """The state of a model that :meth:`export` wrote."""
        self.trainable.load(folder)
        return State(self.trainable.read())

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Train on the client's own examples and return the change of the tensors that travel; or, in a round
        that fits the head, the sums from which that is done.

        Raises:
            DataError: the client has nothing to train on.
            UpdateError: the training loss is not finite, or the task is none.
        """
        asked = self._asked(task)
        if isinstance(asked, HeadTask):
            return self._head_sums(asked, client)
        return self._alone(self._prepare(asked, client, self.correction, self.hooks))

    def execute_together(self, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
        """The tasks of several clients, trained in one batch where the method, the recipe and their states
        allow it. An answer is what :meth:`execute` gives, to rounding, or the error that it raises.
        """
        jobs: list[Job | Update | Exception] = []
        self._tokenize([client.data.train for _, client in pairs])
        self._read_together([(task, client) for task, client in pairs if isinstance(task, FitHeadTask)])
        for task, client in pairs:
            try:
                asked = self._asked(task)
                if isinstance(asked, HeadTask):
                    jobs.append(self._head_sums(asked, client))
                else:
                    jobs.append(self._prepare(asked, client, self.correction, self.hooks))
            except Exception as error:  # whatever one client does wrong, the others go on
                jobs.append(error)
        ready = [job for job in jobs if isinstance(job, Job)]
        answers = iter(self.local.together(ready, self._close))
        return [next(answers) if isinstance(job, Job) else job for job in jobs]

    def widest_cohort(self) -> int:
        """How many clients to train in one batch."""
        return self.local.widest() if self.context.keeps == "nothing" else 1

    def _prepare(
        self,
        task: TrainTask,
        client: Client,
        correction: Correction,
        hooks: AggregationHooks,
        *,
        own: bool = False,
    ) -> Job:
        """Everything that a client's training starts from.

        What is trained for the client's ``own`` use keeps the client's label prior, and all of it is trained.
        """
        self.head_fit.forget()
        examples = self.tokens(client.data.train)
        if not examples:
            raise DataError(f"client {client.name!r} has no examples to train on")
        before = self.ownership.complete(without(task.tensors, CONTROL), client.memory)
        check_state(self.trainable.inwards(before), self.trainable.parameters)
        start = int(client.memory.values.get("examples_seen", 0))
        batches = task.work.batches
        if batches is not None and (type(batches) is not int or batches < 1):
            raise UpdateError(f"batches {batches!r}: must be a whole number from 1")
        ranges = batch_ranges(len(examples), start, self.context.training.batch_size, task.work)
        seed = [self.context.seed, 5, name_seed(client.name)]
        order = example_order(len(examples), start, ranges[-1][1], seed)
        shift = correction.shift(task.tensors, client.memory)
        if shift:
            shift = self.trainable.inwards({**zeros_like(before), **shift})
        return Job(
            task,
            client,
            correction,
            hooks,
            before,
            batches=[[examples[i] for i in order[a - start : b - start]] for a, b in ranges],
            shift=shift,
            seed=[*seed, start],
            stop=ranges[-1][1],
            label_offset=None if own else self._label_offset(task, client),
            resting=frozenset() if own else self.ownership.resting(task),
        )

    def _asked(self, task: Task) -> TrainTask | HeadTask:
        """The task as one of training, or of fitting the head.

        Raises:
            UpdateError: it asks for other than the recipe does in that round.
        """
        asked = task if isinstance(task, HeadTask) else typed(task, TrainTask)
        if isinstance(asked, HeadTask) != (asked.round_number in self.head_fit.rounds):
            raise UpdateError(f"the recipe has no task {task.kind!r} in round {asked.round_number}")
        return asked

    def _read_together(self, pairs: Sequence[tuple[FitHeadTask, Client]]) -> None:
        """Compute what the head is fitted to for several clients that have the same model, with passes over
        all of their examples, since many clients have few.
        """
        same = {tuple(map(id, task.tensors.values())) for task, _ in pairs}
        if len(pairs) < 2 or len(same) > 1 or self.ownership.personal or self.context.keeps != "nothing":
            return
        task = pairs[0][0]
        if task.round_number not in self.head_fit.rounds:
            return
        self.trainable.write(self.ownership.complete(without(task.tensors, CONTROL)))
        tokens = [self.tokens(client.data.train) for _, client in pairs]
        vectors = self.head_fit.inputs([row for rows in tokens for row in rows])
        parts = torch.split(vectors, [len(rows) for rows in tokens])
        self.head_fit.read = {client.name: part for (_, client), part in zip(pairs, parts, strict=True)}

    def _head_sums(self, task: HeadTask, client: Client) -> Update:
        """What a client sends for the head to be fitted; where it keeps everything, it fits its own."""
        examples, memory = client.data.train, client.memory
        if not examples:
            raise DataError(f"client {client.name!r} has no examples to fit the head to")
        if not isinstance(task, FitHeadTask):
            return self.head_fit.execute(task, client.name, examples, [])
        if client.name not in self.head_fit.read:
            self.trainable.write(self.ownership.complete(without(task.tensors, CONTROL), memory))
        update = self.head_fit.execute(task, client.name, examples, self.tokens(examples))
        moments = part(memory.tensors, "moments/")
        moments = {
            name: m for name, m in moments.items() if name.partition("/")[2] not in self.head_fit.names
        }
        if self.context.keeps == "everything":
            head = self.head_fit.alone(*self.head_fit.vectors.pop(client.name))
            self.ownership.remember(memory, {**self.trainable.read(), **head}, moments)
            return HeadSumsUpdate({}, update.weight)
        memory.tensors = without(memory.tensors, "moments/") | named(moments, "moments/")
        return update

    def _label_offset(self, task: TrainTask, client: Client) -> Tensor | None:
        """What the recipe has a client add to its logits in training; once the head was fitted, relative to
        the labels that it was fitted to.
        """
        training, overall = self.context.training, None
        if self.head_fit.rounds:
            if self.context.keeps == "everything":
                return None  # its head is fitted to its own labels
            overall = self.head_fit.label_counts(task)
        if not training.logit_adjustment:
            return None
        return label_offset(
            [example.label for example in client.data.train],
            len(self.base.task.labels),
            strength=training.logit_adjustment,
            prior_count=training.prior_count,
            overall=overall,
        )

    def _alone(self, job: Job) -> TrainUpdate:
        """One client's training."""
        self.trainable.write(job.before)
        return self._close(job, self.local.alone(job))

    def _close(self, job: Job, result: LocalResult) -> TrainUpdate:
        """What a client remembers and sends; the model has its trained tensors."""
        context, memory = self.context, job.client.memory
        memory.values["examples_seen"] = job.stop
        after = self.trainable.read()
        self.ownership.remember(memory, after, result.moments)
        weight = float(len(job.client.data.train))
        update = TrainUpdate({}, weight, loss=result.loss, examples=result.examples, steps=result.steps)
        if context.keeps == "everything":
            return update
        change = {
            name: after[name] - tensor
            for name, tensor in job.before.items()
            if self.ownership.comes_up(name, job.task)
        }
        update = job.hooks.pack(replace(update, tensors=change))

        def rate(name: str) -> float:
            return job.factor * learning_rate(context.training, head=name in self.trainable.head)

        more = job.correction.remember(job.task.tensors, memory, change, rate, result.steps)
        return replace(update, tensors=update.tensors | more)

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Predictions of the global state or, for a client, of its own version of it."""
        memory = client.memory if client is not None else Memory()
        self.trainable.write(self.ownership.complete(state.tensors, memory))
        return predict(
            self.trainable.model,
            self.base,
            self.tokens(examples),
            self.context.evaluation,
            texts=texts,
        )

    def keeps_parts(self) -> bool:
        """Whether clients keep tensors to themselves, while others are merged."""
        return bool(self.ownership.personal)

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """The client's own tensors after ``epochs`` passes over its training data, at the first round's
        learning rate, with nothing that pulls towards the others.
        """
        copied = Client(
            client.name, client.data, Memory(dict(client.memory.tensors), dict(client.memory.values))
        )
        task = self.configure(state, 1, {client.name: Work(epochs=epochs)})[client.name]
        plain = make_correction(AggregationSettings(), 1)
        self._alone(self._prepare(typed(task, TrainTask), copied, plain, AggregationHooks(), own=True))
        return State(self.trainable.read())

    def notes(self, state: State) -> dict[str, str]:
        """None: what was trained is in the model's folder."""
        return {}

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained: the method's own, and the head's."""
        tensors = without(self.trainable.forms(), BASE_CHANGE)
        head = count(tensor for name, tensor in tensors.items() if name in self.trainable.head)
        return count(tensors.values()) - head, head

    # --- parts ---

    def tokens(self, examples: list[Example]) -> list[TokenizedExample]:
        """The examples' tokens, computed once a list."""
        self._tokenize([examples])
        return self._tokens[id(examples)][1]

    def _tokenize(self, lists: Sequence[list[Example]]) -> None:
        """Have the tokens of all these lists, with one call to the tokenizer, which many small ones slow."""
        unique = {id(examples): examples for examples in lists}
        new = [examples for key, examples in unique.items() if key not in self._tokens]
        rest = self.objective.tokens([example for examples in new for example in examples])
        for examples in new:  # a list is kept alive, so that its id stays its own
            self._tokens[id(examples)] = (examples, rest[: len(examples)])
            rest = rest[len(examples) :]

    def _check_rule(self) -> None:
        settings, own = self.aggregation, self.hooks.own_rule
        if settings.correction != "none" and not self.trainable.corrects:
            raise RecipeError(
                f"aggregation.correction = {settings.correction!r}: does not fit tensors that a network "
                "gives anew in each round; train them without one"
            )
        for key in ("rule", "correction", "server_optimizer", "server_learning_rate"):
            if own and getattr(settings, key) != AggregationSettings.model_fields[key].default:
                raise RecipeError(
                    f"aggregation.{key} = {getattr(settings, key)!r}: {own} is a rule of its own; "
                    f"leave {key} at {AggregationSettings.model_fields[key].default!r}"
                )

    def _arrival(self, answer: Answer) -> ClientDelta:
        update = typed(answer.update, TrainUpdate)
        change = self.hooks.unpack(update, self.ownership.wanted(typed(answer.task, TrainTask)))
        weight = update.weight if self.aggregation.weighting == "examples" else 1.0
        sent = without(answer.task.tensors, CONTROL)
        return ClientDelta(answer.client, sent, change, weight, update, answer.discount)

    def _root(self, state: State, task: TrainTask) -> ClientDelta:
        """What the server's own examples would change (FLTrust)."""
        training = self.context.training
        amount = Work(epochs=training.local_epochs)
        if training.local_steps is not None:
            amount = Work(steps=training.local_steps)
        (own,) = self.configure(state, task.round_number, {ROOT: amount}).values()
        client = Client(ROOT, ClientData(ROOT, self.context.root))
        return replace(self._arrival(Answer(ROOT, own, self.execute(own, client))), weight=0.0)

    def _loss(self, batch: Batch) -> Tensor:
        return self.objective.loss(self.trainable.model, batch)
