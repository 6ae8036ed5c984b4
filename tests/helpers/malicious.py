"""A site in this process, and a server that asks it for whatever it likes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fedcustom.deployment.site.data import SiteDataSettings
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.settings import PolicySettings, SiteSettings
from fedcustom.federated.resolve import resolved
from fedcustom.methods import State, Work
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.messages import values_of
from helpers.rows import write_jsonl

NAMES = ["site-0", "site-1"]


class Server:
    """A server with one site, ``site-0``. It names runs, rounds and amounts as it likes."""

    def __init__(
        self, folder: Path, rows: list[dict[str, Any]], data: Mapping[str, Any], policy: Mapping[str, Any]
    ) -> None:
        self.folder, self.own = folder, folder / "own"
        write_jsonl(folder / "rows.jsonl", rows)
        settings = SiteDataSettings(train="rows.jsonl", **data)
        self.settings = SiteSettings(data=settings, policy=PolicySettings(**policy))
        self.site = Resident("site-0", self.settings, folder, self.own)
        self.run, self.states = "0" * 16, dict[str, State]()

    def restart(self) -> None:
        """The site's process starts anew."""
        self.site = Resident("site-0", self.settings, self.folder, self.own)

    def ask(self, kind: str, tensors: Mapping[str, Tensor] | None = None, **fields: Any) -> dict[str, Any]:
        message = {"kind": kind, "run": self.run, **fields}
        if tensors:
            body = self.folder / "in.safetensors"
            safetensors.torch.save_file(dict(tensors), body)
            message["body"] = str(body)
        return self.site.handle(message)

    def begin(
        self, recipe: Mapping[str, Any], *, run: int = 0, labels: list[str] | None = None
    ) -> dict[str, Any]:
        """Describe and open a run; the last reply."""
        self.run = f"{run:016x}"
        content = resolved(load_recipe(dict(recipe))).model_dump(mode="json", exclude_none=True)
        said = self.ask("describe", values={"recipe": content})
        if "values" not in said:
            return said
        told = [str(label) for label in said["values"]["labels"]]
        return self.ask("open", values={"names": NAMES, "labels": labels if labels is not None else told})

    @property
    def method(self) -> Any:
        assert self.site.participant is not None
        return self.site.participant.method

    @property
    def state(self) -> State:
        """The first state of the run."""
        if self.run not in self.states:
            first = self.method.initialise()
            tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
            self.states[self.run] = replace(first, tensors=tensors)
        return self.states[self.run]

    def train(self, number: int = 1, **changes: Any) -> dict[str, Any]:
        """The recipe's own task of a round, but for some values."""
        amounts = Work(steps=changes.pop("steps")) if "steps" in changes else Work(epochs=1)
        task = self.method.configure(self.state, number, {"site-0": amounts})["site-0"]
        fields = {"task": task.kind, "round": number} | changes.pop("fields", {})
        return self.ask("work", task.tensors, values={**values_of(task), **changes}, **fields)

    def evaluate(self, part: Any = "test", after: Any = 0, scale: float = 1.0) -> dict[str, Any]:
        """An evaluation of the first state, its tensors scaled."""
        tensors = {name: tensor * scale for name, tensor in self.state.tensors.items()}
        return self.ask("evaluate", tensors, part=part, after=after, values={})
