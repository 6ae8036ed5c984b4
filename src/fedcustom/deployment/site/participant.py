"""One site's part in one run: the recipe's method on the resident base model, with the site's own data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import PolicyError
from ...core.tensors import Tensors
from ...data.build import with_builtin_columns
from ...data.examples import ClientData, FederatedData, LearningTask
from ...data.own import OwnData
from ...evaluation.statistics import Statistics, classification_statistics, mean_statistics
from ...federated.build import check_fit, make_method
from ...methods import Client, State
from ...models.inference import Predictions, measure
from ...models.load import load_base
from ...recipe.recipe import Recipe
from ...transport.channel import Channel, Packed
from ...updates.pipeline import on_client, update_transforms
from ...updates.transform import ClientContext
from .memory import RoundMemory


class Participant:
    """Does a run's tasks. Loads the base model once, when it is made.

    ``names`` are all clients of the run in their order, ``labels`` those that all sites agreed on.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        names: list[str],
        labels: list[str],
        own: OwnData,
        folder: Path,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        check_fit(recipe)
        _, clients = with_builtin_columns(recipe.data, recipe.clients)
        self.recipe, self.name = recipe, name
        self.data = own.client(name, names.index(name), labels, clients, recipe.seed)
        task = LearningTask(recipe.data.task, tuple(labels))
        self.base = load_base(recipe.model, task, recipe.seed, head=recipe.method.with_head)
        loaded()
        everyone = {other: ClientData(other, []) for other in names} | {name: self.data}
        federation = FederatedData(task, everyone, [], [], test_is_pooled=True, public=own.public)
        self.method = make_method(recipe, self.base, federation)
        self.channel = Channel(recipe.compression, self.method.initialise().tensors)
        self.transforms = update_transforms(recipe.compression)
        self.memory = RoundMemory(folder / "memory")
        self.disk = folder / "disk"

    def sizes(self) -> dict[str, int]:
        """How many examples each part has."""
        return {part: len(getattr(self.data, part)) for part in ("train", "development", "test")}

    def work(
        self, kind: str, values: Mapping[str, Any], packed: Packed, round_number: int | None
    ) -> tuple[Packed, dict[str, Any]]:
        """A task's answer as it travels: its tensors, and its values with the weight. In a round the memory
        changes; outside rounds nothing is remembered.
        """
        task = self.channel.unpack_down(packed, kind, dict(values))
        before = self.memory.before(round_number) if round_number is not None else self.memory.after(2**31)
        client = Client(self.name, self.data, before, self.disk)
        update = self.method.execute(task, client)
        if round_number is None:
            return Packed(update.tensors), {"weight": update.weight, **update.values}
        sent = on_client(self.transforms, update, ClientContext(self.name, task, client.memory))
        self.memory.save(round_number, client.memory)
        return Packed.of(sent), {"weight": sent.weight, **sent.values}

    def evaluate(self, part: str, tensors: Tensors, values: Mapping[str, Any], after: int) -> dict[str, Any]:
        """Statistics of a state on one part of this site's data: of the global model (``whole``) and, where
        clients keep parts or train on, of the site's own version (``own``), with its memory ``after`` a
        round.
        """
        examples = getattr(self.data, part)
        if not examples:
            return {}
        state, recipe = State(tensors, {}, dict(values)), self.recipe
        epochs = recipe.personalisation.finetune_epochs if part == "test" else 0
        personal = self.method.keeps_parts()
        result: dict[str, Any] = {}
        if recipe.method.is_whole or not personal:
            texts = part == "test" and recipe.data.task == "generation"
            result["whole"] = self._statistics(self.method.predict(state, examples, texts=texts), part)
        if personal or epochs:
            own, client = state, Client(self.name, self.data, self.memory.after(after), self.disk)
            if epochs:
                own = self.method.adapt(state, client, epochs)
                client = replace(client, memory=replace(client.memory, tensors={}))
            result["own"] = self._statistics(self.method.predict(own, examples, client, texts=False), part)
        return result

    def _statistics(self, said: Predictions, part: str) -> Statistics:
        examples = getattr(self.data, part)
        if self.recipe.data.task == "classification":
            return classification_statistics(said.scores, [example.label for example in examples])
        # The loss of a generator is a mean over tokens, so that sites count by theirs.
        tokens = {"loss": int(said.scores[:, 1].sum())} if self.recipe.data.task == "generation" else {}
        return mean_statistics(measure(said, examples, self.base), tokens, len(examples))


def refuse_retrieval_without_server(recipe: Recipe) -> None:
    """Questions of a deployed retrieval come from the server, for only it may ask all sites.

    Raises:
        PolicyError: a site was asked to evaluate retrieval by itself.
    """
    if recipe.data.task == "retrieval":
        raise PolicyError("a site cannot ask the others' documents; the server must bring the questions")
