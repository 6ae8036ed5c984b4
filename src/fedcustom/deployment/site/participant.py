"""Client of one run at a site: the recipe's method on the resident base model, with the site's data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...core.errors import PolicyError, RecipeError, UpdateError
from ...core.tensors import Tensors
from ...data.examples import ClientData, Example, FederatedData, LearningTask
from ...data.party_data import OwnData
from ...data.settings import ClientSettings
from ...evaluation.settings import CHOICE_METRIC
from ...evaluation.statistics import Statistics, classification_statistics, mean_statistics
from ...federated.base_model import load_for
from ...federated.build import check_fit, make_method, noised_sums, summation
from ...federated.evaluator import development_predictions, predicted
from ...federated.example_run import example_privacy
from ...federated.private_run import planned
from ...federated.truncation import fitted_data
from ...methods import ChecksTasks, Client, CountsCuts, RoundTask, State, Task, TrainingTask, Update
from ...methods.tuning.hidden_rows import steps_of
from ...methods.tuning.messages import FitHeadTask
from ...methods.tuning.release import OwnNoise
from ...models.inference import Predictions, measure
from ...privacy.client_mechanism import ClientMechanism
from ...privacy.example_mechanism import ExampleMechanism, Releases
from ...privacy.secure_sum.integers import Numbers
from ...recipe.recipe import Recipe
from ...transport.channel import Channel, Packed
from ...transport.messages import read_task, values_of
from ...updates.pipeline import on_client, update_transforms
from ...updates.transform import ClientContext
from ..replies import Part, PartSizes, SiteStatistics
from .amounts import check_amounts, check_least_examples, check_least_training
from .memory import RoundMemory
from .policy import check_content
from .privacy import check_noise, check_own_noise, fresh_key
from .settings import PolicySettings


@dataclass(frozen=True)
class Division:
    """What decides which of a site's rows are held out: the site's number in the run, the recipe's seed and
    its settings of clients.
    """

    number: int
    seed: int
    clients: ClientSettings

    def examples(self, name: str, labels: list[str], own: OwnData) -> ClientData:
        """A site's examples as the client of that name, by part.

        Raises:
            DataError: there is nothing to train on, an empty value, or a label that is not among ``labels``.
        """
        return own.client(name, self.number, labels, self.clients, self.seed)

    def to_values(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {"number": self.number, "seed": self.seed, "clients": self.clients.model_dump(mode="json")}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Division:
        """The inverse of :meth:`to_values`."""
        return cls(values["number"], values["seed"], ClientSettings.model_validate(values["clients"]))


@dataclass(frozen=True)
class Withheld:
    """What a site's policy keeps out of the sums for fitting a head: how many labels, and how many examples
    of them.
    """

    labels: int = 0
    examples: int = 0


class Participant:
    """Client of one run at a site: executes its tasks. The base model is loaded once, by the constructor.

    ``names`` are all clients of the run in their order, ``labels`` those that all sites agreed on, ``data``
    this site's examples (:class:`Division`), ``own`` the rows that they come from, ``policy`` says how few
    examples an answer may be computed from, ``on_load`` is called when the base model is loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        names: list[str],
        labels: list[str],
        data: ClientData,
        own: OwnData,
        folder: Path,
        policy: PolicySettings,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        check_fit(recipe)
        self.recipe, self.name, self.policy, self.data = recipe, data.name, policy, data
        self.settled, self.names = recipe.settled(len(names)), names
        task = LearningTask.of(recipe.data, labels)
        self.base = load_for(recipe, task)
        on_load()
        everyone = {other: ClientData(other, []) for other in names} | {data.name: data}
        federation = FederatedData(task, everyone, [], [], test_is_pooled=True, public=own.public)
        # The site's own templates say which columns may be cut.
        own_inputs = {key: getattr(own.settings, key) for key in ("text", "prompt", "truncate")}
        settings = recipe.data.model_copy(update=own_inputs)
        federation, self.truncation = fitted_data(recipe, settings, self.base, federation)
        self.data = federation.clients[data.name]
        least = max(policy.least_label_examples, recipe.training.least_texts)
        self.data_for_sums, self.withheld = self.data, Withheld()
        if recipe.sums_only:  # of labels that take part, all sites together have enough
            self.withheld = without_rare_labels(self.data, policy.least_label_examples_alone)[1]
        elif recipe.example_privacy is None:  # else noise hides rows, and what is left out would be data too
            self.data_for_sums, self.withheld = without_rare_labels(self.data, least)
        training = recipe.training
        if training.least_texts < least:  # the site's own minimum, whatever the server asks
            training = training.model_copy(update={"fit_head_least_texts": least})
        own_recipe = recipe.model_copy(update={"data": settings, "training": training})
        self.hidden = self._hidden()
        own_noise: OwnNoise | None = None
        if self.hidden is not None and self.hidden.terms is None:
            own_noise = OwnNoise(self.hidden, partial(fresh_key, recipe))
        alone = policy.least_label_examples_alone
        self.method = make_method(own_recipe, self.base, federation, own_noise=own_noise, alone=alone)
        self.mechanism = self._mechanism(federation)
        self.noised = noised_sums(self.method, self.hidden, partial(fresh_key, recipe))
        self.channel = Channel(recipe.compression, self.method.initialise().tensors)
        self.transforms = update_transforms(recipe.compression)
        self.memory = RoundMemory(folder / "memory")
        self.disk = folder / "disk"

    def _mechanism(self, federation: FederatedData) -> ExampleMechanism | None:
        """By what this site hides its training rows, where the recipe says so and has it take part.

        Raises:
            PolicyError: names the key that does not fit this site's rows.
        """
        privacy = example_privacy(self.recipe, federation)
        if privacy is None or self.name not in privacy.planned:
            return None
        try:
            mechanism = privacy.mechanism(self.name, len(self.data.train))
        except RecipeError as error:
            raise PolicyError(str(error)) from None
        check_noise(self.policy, mechanism)
        return mechanism

    def _hidden(self) -> ClientMechanism | None:
        """By what this site hides itself as a whole, where the recipe says that sites do; worked out here.

        Raises:
            PolicyError: names the key that does not fit, or the line of the policy.
        """
        if self.settled.client_privacy is None or self.settled.client_privacy.place == "server":
            return None
        try:
            mechanism = planned(self.settled, len(self.names))
        except RecipeError as error:
            raise PolicyError(str(error)) from None
        assert mechanism is not None
        check_own_noise(self.policy, mechanism)
        return mechanism

    def _check_turn(self, round_number: int | None) -> None:
        """Refuse a round in which it is not this site's turn: its guarantee counts its turns.

        Raises:
            PolicyError: says which round.
        """
        if self.hidden is None:
            return
        cohorts, place = self.hidden.participation.cohorts(self.recipe.seed), self.names.index(self.name)
        if round_number is None or round_number < 1 or place not in cohorts[round_number - 1]:
            raise PolicyError(
                f"privacy.participation: by the recipe round {round_number} is not this site's turn"
            )

    def releases(self, asked: Task) -> Releases:
        """What an answer to a task releases with noise; nothing where rows are not hidden, or the answer has
        nothing of them.
        """
        if self.mechanism is not None and isinstance(asked, FitHeadTask):
            return Releases(head_fits=1)
        if self.mechanism is not None and isinstance(asked, TrainingTask):
            return Releases(steps_of(asked.work, self.mechanism.rows, self.mechanism.batch_size))
        return Releases()

    def sizes(self) -> PartSizes:
        """How many examples each part has; 0 for a part with too few of them to evaluate on."""
        least, data = self.policy.least_examples, self.data
        parts = [len(part) if len(part) >= least else 0 for part in (data.development, data.test)]
        return PartSizes(len(data.train), *parts)

    def check_task(self, asked: Task, round_number: int | None) -> None:
        """Refuse a task whose amounts are not the recipe's, or whose answer would come of too few examples.
        ``round_number`` is what its message says.

        Raises:
            PolicyError: names the amount, or the line of the policy.
        """
        policy, recipe, method = self.policy, self.settled, self.settled.method
        check_amounts(recipe, self.method, asked, round_number)
        contents = method.answer_contents(asked.kind, asked.contents, recipe.data.task)
        check_content(policy, contents, f"the task {asked.kind!r}")
        if asked.documents_asked > policy.max_top:
            raise PolicyError(
                f"policy.max_top = {policy.max_top}: the task asks for {asked.documents_asked} documents"
            )
        count = len(self.data.train)
        self._check_turn(round_number)
        if isinstance(asked, TrainingTask):
            check_least_training(policy, recipe, asked.work, count)
        elif asked.exact_answer:
            check_least_examples(policy, len(self.data_for_sums.train), "examples of frequent labels")
        elif method.examples_scored is not None:
            scored = min(method.examples_scored, count)
            check_least_examples(policy, scored, "examples to score prompts on")
        elif set(contents) & {"updates", "sums", "logits"}:
            in_round = isinstance(asked, RoundTask)
            used = count if in_round or "logits" not in contents else len(self.data.development)
            check_least_examples(policy, used, "examples to answer from")

    def check_state(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        """Refuse to evaluate a state that would take more memory than the recipe's own.

        Raises:
            PolicyError: names what is too long, or too many.
        """
        if isinstance(self.method, ChecksTasks):
            self.method.check_state(State(tensors, {}, dict(values)))

    def task(self, kind: object, values: object) -> Task:
        """The task of a message, whose tensors are still packed.

        Raises:
            WireError: the method has no such task, or a value is not what it allows.
        """
        return read_task(self.method.messages, kind, values)

    def execute(self, asked: Task, packed: Packed, round_number: int | None) -> tuple[Packed, dict[str, Any]]:
        """Execute a task; returns the update as it travels: its tensors, and its values with the weight. In a
        round the memory changes; outside rounds nothing is remembered.
        """
        update = self._update(asked, packed, round_number)[0]
        return Packed.of(update), values_of(update)

    def change(
        self, asked: Task, packed: Packed, round_number: int, needed: int, digest: bytes
    ) -> tuple[Numbers, bytes]:
        """The vector of a task's update, for a secure sum, and what its masks are made from; the memory
        changes. ``needed`` is how many sites have to stay, ``digest`` the task's SHA-256.

        Raises:
            RecipeError, UpdateError: the recipe asks for no secure sums, or the update does not fit into one.
        """
        summed = summation(self.recipe, self.method, len(self.names), lambda: self.noised)
        if summed is None:
            raise UpdateError("the recipe asks for no secure sums")
        update, task = self._update(asked, packed, round_number)
        vector = summed.vector(task)
        return vector.encode(update, self.name, needed), vector.digest(digest)

    def _update(self, asked: Task, packed: Packed, round_number: int | None) -> tuple[Update, Task]:
        """An executed task's update as it travels, and the task as it was unpacked."""
        task = self.channel.unpack_down(packed, asked)
        if round_number is None:
            before = self.memory.after(2**31)
        elif asked.continues:
            before = self.memory.after(round_number)
        else:
            before = self.memory.before(round_number)
        data = self.data_for_sums if asked.exact_answer else self.data
        client = Client(self.name, data, before, self.disk)
        update = self.method.execute(task, client)
        if round_number is None:
            return update, task
        sent = on_client(self.transforms, update, ClientContext(self.name, task, client.memory))
        self.memory.save(round_number, client.memory)
        return sent, task

    def take_cuts(self) -> list[str]:
        """What the method has cut or left out since the last call, beside what :attr:`truncation` counts."""
        return self.method.take_cuts() if isinstance(self.method, CountsCuts) else []

    def evaluate(self, part: Part, tensors: Tensors, values: Mapping[str, Any], after: int) -> SiteStatistics:
        """Statistics of a state on one part of this site's data: of the global model and, where clients keep
        parts or train on, of the site's own version, with its memory ``after`` a round.

        Raises:
            PolicyError: the part has fewer examples than the policy says.
        """
        parts: dict[Part, list[Example]] = {"development": self.data.development, "test": self.data.test}
        examples = parts[part]
        if not examples:
            return SiteStatistics()
        check_least_examples(self.policy, len(examples), f"{part} examples")
        state, recipe = State(tensors, {}, dict(values)), self.recipe
        epochs = recipe.personalisation.finetune_epochs if part == "test" else 0
        personal = self.method.keeps_parts()
        global_model: Statistics | None = None
        personalised: Statistics | None = None
        if recipe.method.is_whole or not personal:
            generates = recipe.data.texts_are_scored and recipe.evaluation.writes_all
            texts = part == "test" and generates
            predictions = self._predicted(part, state, examples, None, texts=texts)
            global_model = self._statistics(predictions, examples)
        if personal or epochs:
            own, client = state, Client(self.name, self.data, self.memory.after(after), self.disk)
            if epochs:
                own = self.method.adapt(state, client, epochs)
                client = replace(client, memory=replace(client.memory, tensors={}))
            predictions = self._predicted(part, own, examples, client, texts=False)
            personalised = self._statistics(predictions, examples)
        return SiteStatistics(global_model, personalised)

    def _predicted(
        self, part: Part, state: State, examples: list[Example], client: Client | None, *, texts: bool
    ) -> Predictions:
        if part == "development":
            return development_predictions(self.method, state, examples, self.recipe.evaluation, client)
        return predicted(self.method, state, examples, client, texts=texts)

    def _statistics(self, predictions: Predictions, examples: list[Example]) -> Statistics:
        if self.recipe.data.task == "classification":
            return classification_statistics(predictions.scores, [example.label for example in examples])
        # A generator's loss is a mean over tokens, that of choices one over the examples with options.
        counts = {CHOICE_METRIC: sum(bool(example.options) for example in examples)}
        if self.recipe.data.texts_are_scored:
            counts["loss"] = int(predictions.scores[:, 1].sum())
        return mean_statistics(measure(predictions, examples, self.base), counts, len(examples))


def without_rare_labels(data: ClientData, least: int) -> tuple[ClientData, Withheld]:
    """A client's data without the training examples of labels of which one text has more than one in
    ``least``, as where it has fewer than ``least`` of them, and what was left out. Data without labels stay
    as they are.
    """
    counts = Counter(example.label for example in data.train if example.label >= 0)
    texts = Counter((example.label, example.text) for example in data.train)
    most = Counter[int]()
    for (label, _), number in texts.items():
        most[label] = max(most[label], number)
    rare = {label: count for label, count in counts.items() if count < least * most[label]}
    if not rare:
        return data, Withheld()
    kept = replace(data, train=[example for example in data.train if example.label not in rare])
    return kept, Withheld(len(rare), sum(rare.values()))


def refuse_retrieval_without_server(recipe: Recipe) -> None:
    """Questions of a deployed retrieval come from the server, for only it may ask all sites.

    Raises:
        PolicyError: a site was asked to evaluate retrieval by itself.
    """
    if recipe.data.task == "retrieval":
        raise PolicyError("a site cannot ask the others' documents; the server must bring the questions")
