"""The sites as a run sees them: who takes part, what they answer, and that they keep their memories."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.allocator import release_freed_memory
from ..core.errors import DeploymentError, UpdateError
from ..core.files import write_text
from ..evaluation.statistics import Statistics, check_statistics
from ..methods import Asked, Method, State, Task, Update
from ..methods.tuning.head_fit import LABEL_COUNTS
from ..recipe.recipe import Recipe
from ..transport import wire
from ..transport.channel import Channel
from ..transport.protocol import Reply
from ..updates.pipeline import on_server, update_transforms
from ..updates.transform import UpdateContext
from .nvflare.sites import SiteReply, Sites
from .settings import FederationSettings

OPENING = 600.0
"""Seconds that sites may take to read their data and load the base model."""


class Remote:
    """The sites as the run sees them: transport of its tasks, and keeper of their memories."""

    def __init__(
        self, recipe: Recipe, settings: FederationSettings, sites: Sites, run: str, run_file: Path
    ) -> None:
        self.recipe, self.settings, self.sites, self.run = recipe, settings, sites, run
        self.run_file = run_file
        self.enough = min(recipe.rounds.min_clients, len(settings.sites))
        self.labels: list[str] = []
        self.sizes: dict[str, dict[str, int]] = {}
        self.refused: dict[str, str] = {}
        self.kept: list[int] = []
        self.restored = 0
        self.method: Method | None = None
        self.channel = Channel(recipe.compression, {})
        self.transforms = update_transforms(recipe.compression)

    # --- opening ---

    def agree(self) -> None:
        """Show every site the recipe, and agree on the labels that occur anywhere.

        Raises:
            DeploymentError: too few sites are there or take part; names the last reason.
        """
        recipe = {"recipe": shown_recipe(self.recipe)}
        found = self._everyone("describe", recipe, list(self.settings.sites))
        values: set[Any] = set()
        for said in found.values():
            values |= set(_labels(said))
        numeric = all(isinstance(value, int | float) for value in values)
        self.labels = [str(value) for value in sorted(values)] if numeric else sorted({*map(str, values)})
        if self.recipe.data.task == "classification" and len(self.labels) < 2:
            raise DeploymentError("the sites' data have one label only; classification needs two or more")
        self.open(list(found))

    def open(self, names: Sequence[str]) -> None:
        """Have sites build the method; they load the base model once."""
        values = {"names": list(self.settings.sites), "labels": self.labels}
        for name, said in self._everyone("open", values, names).items():
            self.sizes[name] = _sizes(said)

    def _everyone(self, kind: str, values: dict[str, Any], names: Sequence[str]) -> dict[str, SiteReply]:
        """What those say who can be reached; the others are noted."""
        head = {"kind": kind, "run": self.run, "values": values}
        found, reason = {}, ""
        enough = min(self.settings.start_with or self.enough, len(names))
        for name, said in self.sites.ask(dict.fromkeys(names, (head, {})), enough, OPENING):
            if said.failure:
                reason = f"{name}: {said.failure}"
                self.sites.note(f"{kind}: {reason}")
                if said.failure.startswith("refused"):
                    self.refused[name] = said.failure
            else:
                found[name] = said
        if len(found) < max(1, enough):
            raise DeploymentError(
                f"{len(found)} of {len(names)} sites take part, {enough} are needed; {reason}"
            )
        return found

    def _admit(self, names: Sequence[str]) -> None:
        """Open the run at sites that have come since it began."""
        new = [
            n for n in names if n not in self.sizes and n not in self.refused and n in self.sites.link.sites
        ]
        if not new:
            return
        for name in new:
            head = {"kind": "describe", "run": self.run, "values": {"recipe": shown_recipe(self.recipe)}}
            ((_, said),) = self.sites.ask({name: (head, {})}, 0, OPENING)
            told = {str(value) for value in _labels(said)}
            if said.failure or told - set(self.labels):
                reason = (
                    said.failure or f"has labels that no other site has: {sorted(told - set(self.labels))}"
                )
                self.sites.note(f"{name} cannot join: {reason}")
                if not said.failure or said.failure.startswith("refused"):
                    self.refused[name] = reason
                continue
            values = {"names": list(self.settings.sites), "labels": self.labels}
            head = {"kind": "open", "run": self.run, "values": values}
            ((_, said),) = self.sites.ask({name: (head, {})}, 0, OPENING)
            if said.failure:
                self.sites.note(f"{name} cannot join: {said.failure}")
            else:
                self.sizes[name] = _sizes(said)
                self.sites.note(f"{name} joined")

    # --- rounds ---

    def exchange(self, tasks: Mapping[str, Task], label: str, absent: Container[str] = ()) -> Iterator[Reply]:
        """Give each site its task and yield the replies in the tasks' order."""
        assert self.method is not None
        number = int(label)
        self.sites.refresh(tasks)
        self._admit(list(tasks))
        packed = {name: self.channel.pack_down(task) for name, task in tasks.items()}
        messages = {}
        for name, task in tasks.items():
            if name in self.refused:
                continue
            head = {"kind": "work", "run": self.run, "task": task.kind, "round": number, "keep": self.kept}
            head |= {"values": task.values, "layout": packed[name].layout}
            messages[name] = (head, packed[name].tensors)
        enough = min(self.enough, len(messages))
        found = self.sites.ask(messages, enough) if messages else iter(())
        for name, task in tasks.items():
            down = packed[name].length({"kind": task.kind, **task.values})
            if name in self.refused:
                yield Reply(name, task, None, self.refused[name], "", 0, 0, 0.0)
                continue
            _, said = next(found)  # in the messages' order, which is the tasks'
            yield self._reply(name, task, down, said)
            del said  # before the next one is read
        self.restored = number

    def _reply(self, name: str, task: Task, down: int, said: SiteReply) -> Reply:
        """A site's answer as it comes out of the channel, checked."""
        assert self.method is not None
        sent, _ = self.channel.down(task)
        if said.failure:
            detail = f"{said.failure}\n"
            return Reply(name, sent, None, said.failure, detail, down, 0, said.seconds)
        try:
            values = dict(said.values)
            weight = values.pop("weight", None)
            if not isinstance(weight, int | float):
                raise UpdateError("an answer without a weight")
            travelled = said.packed.update(float(weight), values)
            update = on_server(self.transforms, travelled, UpdateContext(name, task))
            self.method.check(sent, update)
        except Exception as error:  # whatever a site sends, the others go on
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return Reply(
                name, sent, None, reason, f"{type(error).__name__}: {error}\n", down, said.size, said.seconds
            )
        return Reply(name, sent, update, "", "", down, said.size, said.seconds)

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The sound answers to tasks outside rounds; why others gave none is noted."""
        assert self.method is not None
        messages = {
            name: (
                {"kind": "work", "run": self.run, "task": task.kind, "values": task.values},
                task.tensors,
            )
            for name, task in tasks.items()
            if name not in self.refused
        }
        answers = {}
        for name, said in self.sites.ask(messages, 1):
            task, values = tasks[name], dict(said.values)
            try:
                if said.failure:
                    raise UpdateError(said.failure)
                update = Update(said.packed.tensors, float(values.pop("weight", 1.0)), values)
                self.method.check(task, update)
            except Exception as error:
                self.sites.note(f"site {name} left out: {error}")
                continue
            down = wire.length(task.tensors, {"kind": task.kind, **task.values})
            answers[name] = Asked(update, down, said.size)
        return answers

    # --- memories ---

    def snapshot(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Nothing: sites keep their memories on their own disks, under the run's name."""
        if not self.run_file.exists():
            write_text(self.run_file, self.run)
        return {}, {}

    def restore(self, round_number: int, memories: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Evaluate with what sites remembered after this round; tasks of the next make them go back to it."""
        self.restored = round_number

    def saved(self, rounds: Container[int]) -> None:
        """Sites may forget what no checkpoint goes back to."""
        assert isinstance(rounds, Sequence)
        self.kept = [int(number) for number in rounds]
        release_freed_memory()

    # --- evaluation at the sites ---

    def evaluate(self, state: State, part: str) -> dict[str, dict[str, Statistics]]:
        """What sites tell of a state on one part of their data, by site: of the global model, and of their
        own versions.
        """
        head = {"kind": "evaluate", "run": self.run, "part": part, "after": self.restored}
        head |= {"values": {key: v for key, v in state.values.items() if key != LABEL_COUNTS}}
        names = [name for name, sizes in self.sizes.items() if sizes[part]]
        messages = dict.fromkeys(names, (head, state.tensors))
        found: dict[str, dict[str, Statistics]] = {}
        for name, said in self.sites.ask(messages, min(1, len(names))):
            try:
                if said.failure:
                    raise UpdateError(said.failure)
                told: dict[str, Statistics] = {
                    version: check_statistics(said.values[version], len(self.labels))
                    for version in ("whole", "own")
                    if version in said.values
                }
            except (UpdateError, TypeError, AttributeError, OverflowError) as error:
                self.sites.note(f"site {name} is left out of the evaluation: {error}")
                continue
            if told:
                found[name] = told
        return found


def _labels(said: SiteReply) -> list[Any]:
    """The labels that a site tells; none where it tells something else."""
    told = said.values.get("labels")
    if not isinstance(told, list) or not all(isinstance(value, str | int | float) for value in told):
        return []
    return told


def _sizes(said: SiteReply) -> dict[str, int]:
    """How many examples a site has of each part; none where it tells something else."""
    told = said.values.get("sizes")
    counts = told if isinstance(told, dict) else {}
    return {
        part: count if type(count := counts.get(part)) is int and 0 <= count < 2**40 else 0
        for part in ("train", "development", "test")
    }


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as sites are shown it: complete, without the paths of anybody's data."""
    content: dict[str, Any] = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    content["data"].pop("source", None)
    if recipe.public.source is not None or recipe.public.fraction:
        content["public"] |= {"source": "each party's own file", "fraction": 0.0}
    return content
