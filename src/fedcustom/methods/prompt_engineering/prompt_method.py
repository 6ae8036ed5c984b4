"""Base class of the prompt engineering strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import RecipeError
from ...models.configuration import HUB_NAMES
from ...models.load import Base
from ..protocol import Client, State, Values
from ..sequential_clients import SequentialClients
from ..tuning.technique import Context
from .prompt_file import prompt_notes, read_prompt, write_prompt


class PromptMethod(SequentialClients):
    """A method whose result is a prompt. A strategy adds the five verbs, and says what its prompt is."""

    strategy: str
    context: Context
    base: Base

    def prompt(self, state: State) -> dict[str, Any]:
        """The content of ``prompt.json``."""
        raise NotImplementedError

    def restore(self, content: dict[str, Any]) -> State:
        """The state behind such a content."""
        raise NotImplementedError

    def export(self, state: State, folder: Path) -> None:
        """Write the prompt, the tokenizer and a page that shows how to use them with the base model."""
        write_prompt(self.base, self.prompt(state), folder)

    def open(self, folder: Path) -> State:
        """The state of a prompt that :meth:`export` wrote."""
        return self.restore(read_prompt(folder, self.strategy))

    def notes(self, state: State) -> dict[str, str]:
        """The prompt, for use elsewhere."""
        return prompt_notes(self.prompt(state))

    def keeps_parts(self) -> bool:
        """No: there is one prompt for all."""
        return False

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """Nothing trains, so nothing can train on.

        Raises:
            RecipeError: always.
        """
        raise RecipeError("personalisation.finetune_epochs: the method trains no weights")

    def sizes(self, state: State) -> tuple[int, int]:
        """No numbers are trained."""
        return 0, 0

    def state(self, values: Values) -> State:
        """A state without tensors."""
        return State({}, {}, values)

    def described(self, form: Values, provenance: Values) -> dict[str, Any]:
        """A prompt with what it is for and where it comes from."""
        return {
            "strategy": self.strategy,
            "task": self.base.task.kind,
            **form,
            "provenance": {
                "model": HUB_NAMES.get(self.base.name, self.base.name),
                "seed": self.context.seed,
                **provenance,
            },
        }
