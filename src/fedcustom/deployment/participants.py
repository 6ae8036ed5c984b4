"""Participants of a run: the sites that agreed on it, when it began or later."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..core.errors import DeploymentError
from ..data.cells import in_order
from ..recipe.recipe import Recipe
from .connection import SiteConnection, SiteFailure
from .replies import MAX_LABELS, Label, LabelList, PartSizes

T = TypeVar("T")


class Participants:
    """Participants of a run, and the admission of sites that come after it has begun.

    Attributes:
        clients: names of all sites of the federation, in their order; not all need take part.
        labels: the labels that all participants agreed on, in the order of the classifier's outputs.
        sizes: the sizes of each participant's data.
        refused: sites that take no part, and why.
    """

    def __init__(
        self,
        connection: SiteConnection,
        recipe: Mapping[str, Any],
        clients: Sequence[str],
        labels: Sequence[str],
        sizes: Mapping[str, PartSizes],
        refused: Mapping[str, str],
    ) -> None:
        self.connection, self.recipe, self.clients = connection, recipe, list(clients)
        self.labels, self.sizes, self.refused = list(labels), dict(sizes), dict(refused)

    def admit(self, names: Sequence[str]) -> None:
        """Open the run at those of the named sites that have connected since it began."""
        known, reachable = self.sizes.keys() | self.refused.keys(), self.connection.reachable
        for name in [name for name in names if name in reachable and name not in known]:
            if failure := self._open_at(name):
                self.connection.note(f"{name} cannot join: {failure.reason}")
                if failure.refused:
                    self.refused[name] = failure.reason
            else:
                self.connection.note(f"{name} joined")

    def _open_at(self, name: str) -> SiteFailure | None:
        """Show one site the recipe and open the run there; returns why that failed."""
        ((_, described),) = self.connection.describe([name], self.recipe, 0)
        if isinstance(described, SiteFailure):
            return described
        unknown = {str(label) for label in described.labels} - set(self.labels)
        if unknown:
            return SiteFailure(f"has labels that no other site has: {sorted(unknown)}", refused=True)
        ((_, sizes),) = self.connection.open([name], self.clients, self.labels, 0)
        if isinstance(sizes, SiteFailure):
            return SiteFailure(sizes.reason)
        self.sizes[name] = sizes
        return None


def agree(
    connection: SiteConnection, recipe: Recipe, clients: Sequence[str], min_participants: int
) -> Participants:
    """Agree on a run with the sites: show them the recipe, unite their labels, and have them open the run.

    Raises:
        DeploymentError: fewer than ``min_participants`` sites are there or take part, with the last reason;
            or their data have one label only.
    """
    shown, refused = shown_recipe(recipe), dict[str, str]()

    def collect(
        kind: str, replies: Iterator[tuple[str, T | SiteFailure]], asked: int, needed: int
    ) -> dict[str, T]:
        """The sound replies, of which ``needed`` and at least one are required."""
        sound, reason = dict[str, T](), ""
        for name, reply in replies:
            if isinstance(reply, SiteFailure):
                reason = f"{name}: {reply.reason}"
                connection.note(f"{kind}: {reason}")
                if reply.refused:
                    refused[name] = reply.reason
            else:
                sound[name] = reply
        if len(sound) < max(1, needed):
            raise DeploymentError(f"{len(sound)} of {asked} sites take part, {needed} are needed; {reason}")
        return sound

    needed = min(min_participants, len(clients))
    described = collect("describe", connection.describe(clients, shown, needed), len(clients), needed)
    for name in _with_too_many_labels(described):
        refused[name] = (
            f"has {len(described.pop(name).labels)} labels, too many together with those of others"
        )
        connection.note(f"describe: {name}: {refused[name]}; a run has at most {MAX_LABELS}")
    labels = united_labels([label for reply in described.values() for label in reply.labels])
    if len(described) < needed:
        raise DeploymentError(f"{len(described)} of {len(clients)} sites take part, {needed} are needed")
    if recipe.data.task == "classification" and len(labels) < 2:
        raise DeploymentError("the sites' data have one label only; classification needs two or more")
    names = list(described)
    needed = min(min_participants, len(names))
    sizes = collect("open", connection.open(names, clients, labels, needed), len(names), needed)
    return Participants(connection, shown, clients, labels, sizes, refused)


def united_labels(labels: Sequence[Label]) -> list[str]:
    """All sites' labels as texts, each once: in the order of numbers if all are numbers, else of texts."""
    return list(in_order(str(label) for label in labels))


def _with_too_many_labels(described: Mapping[str, LabelList]) -> list[str]:
    """The sites without which the others' labels are no more than a run may have: those with most labels."""
    left, without = dict(described), list[str]()
    while len(united_labels([label for reply in left.values() for label in reply.labels])) > MAX_LABELS:
        without.append(max(left, key=lambda name: len(left[name].labels)))
        del left[without[-1]]
    return without


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as sites are shown it: complete, without the paths of anybody's data and the server's
    trackers.
    """
    content: dict[str, Any] = json.loads(
        json.dumps(recipe.untracked.model_dump(mode="json", exclude_none=True))
    )
    content["data"].pop("source", None)
    if recipe.public.source is not None or recipe.public.fraction:
        content["public"] |= {"source": "each party's own file", "fraction": 0.0}
    return content
