"""The base model as it is: zero-shot, or few-shot in context (Brown et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...core.errors import DataError, UpdateError
from ...data.examples import Example
from ...models.inference import Predictions, predict
from ..messages import Task, Update, Work, typed
from ..prompt_engineering.prompt_method import PromptMethod
from ..prompt_engineering.templates import INPUT
from ..protocol import Aggregate, Answer, Client, Prompts, State
from ..tuning.technique import Context
from .messages import SHOTS, ShotsTask, ShotsUpdate
from .prompts import FewShot, Room
from .settings import UntunedSettings

STREAM = 25
"""Of the seed, from which examples are drawn."""


class Untuned(PromptMethod):
    """The verbs of a model that nobody customises, as a baseline. In its one round the only client of the
    centralised baseline draws ``method.shots`` of all training rows, and these stand before every prompt from
    then on (:class:`~.prompts.FewShot`). With 0 the prompts are those of the recipe, and the scores those of
    the untuned model.

    Discloses: the examples that are drawn, word for word, to everybody who has the prompt or the exported
    folder. Zero-shot: a client's number of examples.
    """

    strategy = "untuned"
    messages = SHOTS

    def __init__(self, settings: UntunedSettings, context: Context) -> None:
        self.settings, self.context, self.base = settings, context, context.base
        self.prompting = FewShot(self.base, context.data, context.evaluation)

    # --- server ---

    def initialise(self) -> State:
        """No examples: zero-shot."""
        return State({}, {}, {"shots": []})

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Draw examples."""
        return {name: ShotsTask(round_number=round_number) for name in work}

    def check(self, task: Task, update: Update) -> None:
        """Refuse another number of examples than the recipe's, and tensors."""
        shots = typed(update, ShotsUpdate).shots
        if update.tensors:
            raise UpdateError("examples are no tensors")
        if len(shots) != self.settings.shots:
            raise UpdateError(f"shots: {len(shots)} examples; the recipe says {self.settings.shots}")

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The examples of all who answered: of one, or none."""
        found = [shot for answer in answers for shot in typed(answer.update, ShotsUpdate).shots]
        return Aggregate(State({}, {}, {"shots": found}), {"shots": len(found)})

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Examples drawn by the seed, without replacement.

        Raises:
            DataError: there are fewer.
        """
        typed(task, ShotsTask)
        rows, count = client.data.train, self.settings.shots
        if count > len(rows):
            raise DataError(f"method.shots = {count}: there are {len(rows)} training rows")
        order = np.random.default_rng([self.context.seed, STREAM]).permutation(len(rows))[:count]
        shots = self.prompting.shots_of([rows[int(i)] for i in order])
        return ShotsUpdate({}, float(len(rows)), examples=len(rows), shots=shots)

    # --- the model ---

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Losses and, if asked for, texts behind the examples of the state. A text that goes on with an
        example of its own ends before that (:meth:`~.prompts.FewShot.stop`).
        """
        shots = state.values["shots"]
        rows = self.prompting.tokens(shots, examples)
        said = predict(self.base.model, self.base, rows, self.context.evaluation, texts=texts)
        if said.texts is None or not (stop := self.prompting.stop(shots)):
            return said
        return replace(said, texts=[text.partition(stop[0])[0].strip() for text in said.texts])

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The inputs behind the examples of the state, for the base model."""
        shots = state.values["shots"]
        rows = self.prompting.tokens(shots, examples)
        sources = [row.source.tolist() for row in rows]
        return Prompts(self.base.model, self.base, sources, self.prompting.stop(shots))

    def prompt(self, state: State) -> dict[str, Any]:
        """The examples, and a prompt that holds them all."""
        shots = state.values["shots"]
        form = {
            "messages": self.prompting.messages(shots, INPUT),
            "placeholder": INPUT,
            "stop": list(self.prompting.stop(shots)),
            "shots": shots,
        }
        return self.described(form, {"shots": len(shots)})

    def restore(self, content: dict[str, Any]) -> State:
        """The examples of the file."""
        return State({}, {}, {"shots": content["shots"]})

    def take_cuts(self) -> list[str]:
        """How many examples prompts had no room for, since the last call."""
        found, self.prompting.left_out = self.prompting.left_out, Room()
        return found.in_words(self.base.name, self.prompting.limit or 0)
