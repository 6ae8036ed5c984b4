"""Weight tuning: the five verbs of every method that trains tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...aggregation.settings import AggregationSettings
from ...core.errors import RecipeError
from ...core.tensors import Tensors, count, without
from ...data.examples import Example
from ...data.tokens import TokenizedExample
from ...models.inference import Predictions
from ...models.load import Base
from ...models.quantised_layers import exact_weights
from ...privacy.client_mechanism import LONGEST_NOISE
from ...privacy.clipping import groups_of
from ...training.dpo import DPO
from ..messages import MessagePair, Messages, Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, FigureForm, Memory, Prompts, State
from .aggregation_hooks import BASE_CHANGE, AggregationHooks
from .checkpoint_check import check_checkpointing
from .client import TuningClient
from .drift_corrections import make_correction
from .export_check import Reference, reference, some
from .head_client import HeadClient
from .head_fit import HeadFit
from .head_layer import last_layer, output_names
from .local_training import LocalTraining
from .messages import OPEN_KINDS, SUMMED_KINDS, HeadTask, SumNoisedTask, TrainTask
from .objective import Objective, Supervised
from .ownership import Ownership
from .parts import TokenCache, TuningParts
from .preference_objective import Preference
from .reference_model import ReferenceModel
from .server import TuningServer, check_rule, released_tensors
from .summed_head_client import SummedHeadClient
from .summed_head_fit import SummedHeadFit
from .technique import Context, Technique, TrainableModel, prepare_precision
from .trial import trial_pass, trial_rows


class WeightTuning:
    """The verbs of a :class:`~fedcustom.methods.protocol.Method` that trains tensors by backpropagation.

    The server's verbs are :class:`~.server.TuningServer`'s, the clients' :class:`~.client.TuningClient`'s;
    both are built on one resident model.

    Discloses: each round, every client sends the change of its trained tensors, its number of training
    examples and its mean training loss. Changes of trained tensors can reveal training data to a server that
    attacks them. In rounds of ``training.fit_head_rounds`` it sends what
    :class:`~fedcustom.methods.tuning.head_fit.HeadFit` says instead, and what a further exchange of a
    method's own rule says beside it. With ``privacy.unit = "example"`` the change is made of noised
    gradients, which hide each training row, sums are noised, and no loss is sent.
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
        original = list(context.base.model.parameters())
        self.trainable = technique.attach(context.base, context.seed)
        prepare_precision(context.base, original)
        objective_on = partial(make_objective, context, self.trainable, objective)
        padding = trial_pass(
            name, self.trainable, objective_on(context.base), context.base, context.evaluation
        )
        self.base = replace(context.base, padding=padding)
        self.objective = objective_on(self.base)
        federated = context.keeps == "nothing"
        # A baseline is ordinary training: nothing is merged by rules.
        aggregation = context.aggregation if federated else AggregationSettings()
        self.hooks = self.trainable.hooks if federated and self.trainable.hooks else AggregationHooks()
        correction = make_correction(aggregation, context.clients)
        check_rule(aggregation, self.hooks, self.trainable)
        if context.privacy is not None and self.hooks.own_rule:
            raise RecipeError(
                f"privacy.unit = 'client': {self.hooks.own_rule} merges by a rule of its own, in which one "
                "client's part has no bound"
            )
        if context.sums_only and self.hooks.own_rule and not self.hooks.linear:
            raise RecipeError(f"secure_sum.on = true: {self.hooks.own_rule} needs each client's own change")
        self.ownership = Ownership(context, self.trainable, self.hooks)
        head_rounds = context.training.rounds_of_head_fits(context.rounds)
        layer = last_layer(self.trainable, self.base) if head_rounds else None
        asked = context.training.clients_of_head_fits(context.clients) if federated else 1
        least = context.training.least_texts if federated else 1  # a baseline's data stay in one place
        fit = SummedHeadFit if context.sums_only else HeadFit
        self.head_fit = fit(
            context.training,
            layer,
            clients=asked,
            least=least,
            privacy=context.privacy,
            release=context.release,
            hides_rows=context.row_privacy is not None,
            sent=context.keeps != "everything",
            owners=context.sum_terms.owners,
        )
        if self.ownership.personal & self.head_fit.names:
            raise RecipeError("training.fit_head_rounds: does not go with a head that stays with the clients")
        if self.base.compile:
            self.trainable.model.compile(dynamic=True)
        model, objective, rows = self.trainable.model, self.objective, trial_rows(self.objective, self.base)
        if context.training.gradient_checkpointing:
            check_checkpointing(self.trainable, objective, self.base, rows)
        self.local = LocalTraining(
            self.trainable,
            objective,
            context.training,
            self.base,
            lambda batch: objective.loss(model, batch),
            rows,
        )
        if context.row_privacy is not None:
            self.local.check_row_gradients()
        self._tokens = TokenCache(objective)
        parts = TuningParts(
            context=context,
            trainable=self.trainable,
            objective=objective,
            base=self.base,
            aggregation=aggregation,
            hooks=self.hooks,
            correction=correction,
            ownership=self.ownership,
            head_rounds=head_rounds,
            further=self.hooks.further(aggregation),
        )
        if context.privacy is not None:
            self._bound(parts)
        head = (SummedHeadClient if context.sums_only else HeadClient)(
            context.training,
            layer,
            self.trainable,
            objective,
            self.base,
            least=least,
            batch_size=context.evaluation.batch_size,
            privacy=context.privacy,
            row_privacy=context.row_privacy,
            terms=context.sum_terms,
        )
        self.client = TuningClient(parts, self.local, head, self._tokens)
        self.server = TuningServer(parts, self.head_fit, self.client.execute)

    def _bound(self, parts: TuningParts) -> None:
        """Note in how many groups tensors are bounded, and refuse noise of clients that drowns a change.

        Raises:
            RecipeError: the noise is too long, and the recipe does not accept it.
        """
        context, head = self.context, self.trainable.head
        released = released_tensors(parts, self.trainable.forms())
        groups = groups_of(released, head)
        parts.bounded_groups = len(groups)
        if (noise := context.own_noise) is None or noise.mechanism.settings.accept_noise:
            return
        for group, names in groups.items():
            numbers = sum(released[name].numel() for name in names)
            if (length := noise.length(numbers, len(groups))) > LONGEST_NOISE:
                raise RecipeError(
                    f"privacy.noise = 'client': in the group {group!r} of {numbers:,} numbers the noise of "
                    f"one client is {length:,.0f} times as long as its bound, above {LONGEST_NOISE:g}; train "
                    "fewer numbers, use 'sum', or set privacy.accept_noise = true"
                )

    def remarks(self) -> list[str]:
        """What users should know of how this model trains with this method."""
        found, name = list(self.trainable.remarks), self.base.name
        if self.base.task.preference and self.base.chat is None:
            found.append(
                f"{name}: its tokenizer has no chat template, so that prompts and answers are plain texts "
                "(data.chat_template names one)"
            )
        if self.base.padding == "none":
            found.append(f"{name}: padding changes its results, so that batches hold texts of one length")
        self.widest_cohort()
        if self.local.unshared:
            found.append(
                f"{name}: clients are trained one after another, since in one batch its "
                f"{self.base.model.config.model_type} code does not give what it gives for one client alone "
                f"({self.local.unshared})"
            )
        if kept := self.local.kept_states():
            found.append(f"{name}: {kept}")
        return found

    def untransformed(self, *, aggregate: bool) -> list[str]:
        """The sums of rounds that fit the head; with ``aggregate``, tensors with a rule of their own."""
        found = []
        if rounds := sorted(self.server.parts.head_rounds):
            found.append(
                f"training.fit_head_rounds = {rounds}: clients send sums in place of changes in these rounds "
                "(training.fit_head = false)"
            )
        if aggregate and self.hooks.own_rule:
            found.append(
                f"{self.hooks.own_rule}: has a rule of its own, whose result on_aggregate does not see"
            )
        return found

    @property
    def messages(self) -> Messages:
        """Training, with what the method's hooks answer, fitting the head, and the exchange that the hooks
        need beside these.
        """
        further = self.server.parts.further
        own = further.messages if further is not None else {}
        head = OPEN_KINDS
        if self.context.sums_only:
            noised = self.context.row_privacy is not None
            head = {k: pair for k, pair in SUMMED_KINDS.items() if (pair.task is SumNoisedTask) == noised}
        return {TrainTask.kind: MessagePair(TrainTask, self.hooks.update), **head, **own}

    # --- server ---

    def initialise(self) -> State:
        """The tensors as the technique initialises them."""
        return self.server.initialise()

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Tasks that train from the global state, or that ask for what the head is fitted from
        (:meth:`.server.TuningServer.configure`).
        """
        return self.server.configure(state, round_number, work)

    def check(self, task: Task, update: Update) -> None:
        """Refuse what is not a sound answer (:meth:`.server.TuningServer.check`)."""
        self.server.check(task, update)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The next global state, and a report of the round (:meth:`.server.TuningServer.aggregate`)."""
        return self.server.aggregate(state, answers)

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Train on the client's own examples, or send what the head is fitted from
        (:meth:`.client.TuningClient.execute`).
        """
        return self.client.execute(task, client)

    def execute_together(self, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
        """The tasks of several clients, in one batch where that is possible."""
        return self.client.execute_together(pairs)

    def widest_cohort(self) -> int:
        """How many clients to train in one batch."""
        return self.client.widest_cohort()

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """The client's own tensors after ``epochs`` passes over its training data, at the first round's
        learning rate, with nothing that pulls towards the others.
        """
        copied = Client(
            client.name, client.data, Memory(dict(client.memory.tensors), dict(client.memory.values))
        )
        task = self.configure(state, 1, {client.name: Work(epochs=epochs)})[client.name]
        plain = make_correction(AggregationSettings(), 1)
        job = self.client.prepare(typed(task, TrainTask), copied, plain, AggregationHooks(), own=True)
        self.client.alone(job)
        return State(self.trainable.read())

    # --- the model ---

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Predictions of the global state or, for a client, of its own version of it."""
        memory = client.memory if client is not None else Memory()
        self.trainable.write(self.ownership.complete(state.tensors, memory))
        return self.objective.predict(
            self.trainable.model, self.tokens(examples), self.context.evaluation, texts=texts
        )

    def change_forms(self, task: Task) -> Tensors:
        """Names, shapes and dtypes of what a client's answer to a task to train, or to a further exchange by
        the method's own rule, adds up to.

        Raises:
            UpdateError: the task is another one.
        """
        further = self.server.parts.further
        if further is not None and task.kind in further.messages:
            return further.forms(task)
        asked = typed(task, TrainTask)
        return self.hooks.forms(self.ownership.wanted(asked), asked)

    def figure_forms(self, task: Task) -> Mapping[str, FigureForm] | None:
        """The forms of what a client's answer adds up to, to a task of which a head is fitted under secure
        sums; None of another task, whose answer is a change.

        Raises:
            UpdateError: the task's totals are not of this run's labels.
        """
        if not isinstance(task, HeadTask) or not isinstance(self.head_fit, SummedHeadFit):
            return None
        return self.head_fit.forms(task)

    def keeps_parts(self) -> bool:
        """Whether clients keep tensors to themselves, while others are merged."""
        return bool(self.ownership.personal)

    def scaled(self, state: State, factor: float) -> State | None:
        """The state whose logits are ``factor`` times as large, by the weight and bias of the head's last
        layer; None where there is none, or it stays with the clients.
        """
        names = output_names(self.trainable, self.base)
        if not names or not names <= state.tensors.keys():
            return None
        return replace(state, tensors={n: t * factor if n in names else t for n, t in state.tensors.items()})

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The examples' inputs, cut to the recipe's lengths, and the model of this state."""
        sources = [row.source.tolist() for row in self.objective.tokens(examples)]
        return Prompts(self.with_state(state).eval(), self.base, sources)

    def with_state(self, state: State) -> Any:
        """Put a state into the model, and return that."""
        self.trainable.write(self.ownership.complete(state.tensors))
        return self.trainable.model

    def export(self, state: State, folder: Path) -> None:
        """Write the adapter or model of this state, with its tokenizer. A whole model is written with the
        exact weights of a base that is quantised in training.

        Raises:
            ExportError: there is too little memory for them.
        """
        self.with_state(state)
        with exact_weights(self.base.model, self.base.quantised if self.trainable.whole else None):
            self.trainable.save(folder)
        self.base.tokenizer.save_pretrained(folder)

    def reference(self, state: State, examples: Sequence[Example]) -> Reference:
        """The outputs of this state's model, for the check of its export: with the exact weights of its base.

        Raises:
            ExportError: there is too little memory for them.
        """
        chosen = some(examples)
        model, tokens = self.with_state(state), self.tokens(chosen)
        with exact_weights(self.base.model, self.base.quantised):
            return reference(model, self.base, chosen, tokens)

    def open(self, folder: Path) -> State:
        """The state of a model that :meth:`export` wrote."""
        self.trainable.load(folder)
        return State(self.trainable.read())

    def notes(self, state: State) -> dict[str, str]:
        """None: what was trained is in the model's folder."""
        return {}

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained: the method's own, and the head's."""
        rounds = range(1, self.context.rounds + 1)
        tensors = {
            name: tensor
            for name, tensor in without(self.trainable.forms(), BASE_CHANGE).items()
            if any(self.hooks.trains(name, number) for number in rounds)
        }
        head = count(tensor for name, tensor in tensors.items() if name in self.trainable.head)
        return count(tensors.values()) - head, head

    def tokens(self, examples: list[Example]) -> list[TokenizedExample]:
        """The examples' tokens, computed once a list."""
        return self._tokens.of(examples)


def make_objective(
    context: Context, trainable: TrainableModel, given: Objective | None, base: Base
) -> Objective:
    """The objective that a method brings along (``given``); else that of the task. The model has the first
    tensors.
    """
    if given is not None:
        return given
    if base.task.preference:
        loss, size = DPO.of(context.training), context.evaluation.batch_size
        return Preference(base, context.data, loss, ReferenceModel(trainable), size)
    return Supervised(base, context.data)
