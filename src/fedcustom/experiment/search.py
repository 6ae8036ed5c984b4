"""Learning rates, chosen on the development split with as many trials for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import RecipeError
from ..evaluation.metrics import is_better
from ..recipe.overrides import merged
from .grid import Cell, cell_recipe, digest, group_of, search_axes, without_seeds
from .results import Result
from .settings import ExperimentSettings, nested


@dataclass(frozen=True)
class Trial:
    """One rate tried with one seed for one group of cells; ``cell`` is a run of its own, which is no cell of
    the grid.
    """

    group: tuple[str, ...]
    rate: float
    cell: Cell

    @property
    def name(self) -> str:
        """``<point>--<point>--<rate>--seed-<seed>``."""
        return "--".join([*self.group, f"{self.rate:g}", f"seed-{self.cell.seed}"])


def trials(
    settings: ExperimentSettings, base: Mapping[str, Any], cells: Sequence[Cell], where: str
) -> list[Trial]:
    """What is to be tried for the cells, group by group: each rate at the group's first cell, or where
    ``search.at`` says.

    Raises:
        RecipeError: a trial's recipe is not possible.
    """
    search = settings.search
    if search is None:
        return []
    first: dict[tuple[str, ...], dict[str, str]] = {}
    for at in without_seeds(cells):
        first.setdefault(group_of(settings, at), {**at, **search.at})
    found = []
    for group, at in first.items():
        at = {**at, **dict(zip(search_axes(settings), group, strict=True))}
        for rate in search.rates_at(at):
            more = merged(search.set, nested(search.setting, rate))
            # A trial is read on the development split alone; the rest need not be measured.
            more = merged({"evaluation": {"untuned": False}}, more)
            for seed in search.seeds or settings.seeds[:1]:
                recipe = cell_recipe(settings, base, at, seed, f"{where}, search", more)
                found.append(Trial(group, rate, Cell(at, seed, recipe)))
    return found


def choose(
    settings: ExperimentSettings,
    made: Sequence[Trial],
    results: Mapping[str, Result],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``search.json``: of each group every rate with its development score, the mean over the
    search's seeds, and the rate that was chosen, the best (of equals the first in the list).

    ``at_edge`` warns that the best rate is the smallest or the largest of those tried. A rate that failed
    with any seed has no score.

    Raises:
        RecipeError: no rate of a group has a score.
    """
    assert settings.search is not None
    groups: dict[str, dict[str, Any]] = {}
    for trial in made:
        result = results.get(trial.name)
        entry = groups.setdefault("--".join(trial.group), {"points": list(trial.group), "trials": {}})
        runs = entry["trials"].setdefault(trial.rate, [])
        runs.append(
            {
                "seed": trial.cell.seed,
                "score": result.score if result else None,
                "round": result.best_round if result else None,
                "seconds": result.seconds["total"] if result else None,
                "digest": digest(trial.cell.recipe),
                "failed": failed.get(trial.name),
            }
        )
        entry |= {"metric": trial.cell.recipe.metric, "at": trial.cell.points}
    for name, entry in groups.items():
        rates = entry["trials"]
        means = {rate: _mean([run["score"] for run in runs]) for rate, runs in rates.items()}
        entry["trials"] = [{"rate": rate, "score": means[rate], "runs": runs} for rate, runs in rates.items()]
        best: tuple[float, float] | None = None
        for rate, score in means.items():
            if score is not None and (best is None or is_better(score, best[1], entry["metric"])):
                best = rate, score
        if best is None:
            reasons = [run["failed"] for runs in rates.values() for run in runs if run["failed"]]
            raise RecipeError(f"search {name}: no rate gave a score; {(reasons or ['not a number'])[-1]}")
        entry |= {"chosen": best[0], "at_edge": best[0] in (min(rates), max(rates))}
    return {"setting": settings.search.setting, "split": "development", "groups": groups}


def _mean(scores: Sequence[float | None]) -> float | None:
    """The mean of scores; None where one is not there or no number."""
    there = [score for score in scores if score is not None and math.isfinite(score)]
    return sum(there) / len(there) if len(there) == len(scores) else None


def chosen_tables(content: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """What ``search.json`` lays over a group's recipes."""
    return {
        tuple(entry["points"]): nested(content["setting"], entry["chosen"])
        for entry in content["groups"].values()
    }
