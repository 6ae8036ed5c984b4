"""The cells of a grid, every combination of points and seeds; and those of an experiment's file."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import RecipeError
from ..federated.resolve import resolved
from ..recipe.overrides import merged
from ..recipe.recipe import Recipe, parse_recipe
from ..recipe.sections import FEDERATED_ONLY
from .settings import ExperimentSettings, Match, check_match, is_baseline, matches

Points = Mapping[str, str]
"""A cell's point on each axis."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its point on each axis, its seed and its recipe. Nobody asked for one that is
    ``added`` to a comparison: if it fails, that is no failure of the comparison.
    """

    points: dict[str, str]
    seed: int
    recipe: Recipe
    added: bool = False

    @property
    def name(self) -> str:
        """``<point>--<point>--seed-<n>``, the points in the order of the axes."""
        return "--".join([*self.points.values(), f"seed-{self.seed}"])

    @property
    def digest(self) -> str:
        """A digest of the complete recipe: two cells with the same one give the same result."""
        return digest(self.recipe)


def grid(
    axes: Mapping[str, Iterable[str]],
    seeds: Sequence[int],
    recipe_at: Callable[[Points, int], Recipe],
    wanted: Callable[[Points, int], bool] = lambda at, seed: True,
) -> list[Cell]:
    """Every combination of points and seeds, the last axis and then the seeds running fastest.

    Args:
        axes: The points of each axis, by its name.
        seeds: The seeds at each combination.
        recipe_at: Makes the recipe of a cell.
        wanted: Says which cells there are.

    Raises:
        RecipeError: a cell's recipe is not possible.
    """
    cells = []
    for combination in itertools.product(*axes.values()):
        at = dict(zip(axes, combination, strict=True))
        cells += [Cell(at, seed, recipe_at(at, seed)) for seed in seeds if wanted(at, seed)]
    return cells


CLASSIFIERS_ALONE = (
    ("model", "pooling"),
    ("training", "fit_head_steps"),
    ("training", "fit_head_c"),
    ("evaluation", "calibrate"),
)
"""Settings that have no effect on what is not classified."""


def digest(recipe: Recipe) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the complete recipe. What is unset is left out, so that a
    new setting that nobody sets makes no old result another's. Also left out are trackers and workers,
    which change no result beyond rounding, and, where nothing is classified, what only classifiers have.
    """
    complete = resolved(recipe).model_dump(exclude={"compare", "tracking", "workers"}, exclude_none=True)
    if recipe.data.task != "classification":
        for section, key in CLASSIFIERS_ALONE:
            complete[section].pop(key, None)
    content = json.dumps(complete, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def experiment_cells(
    settings: ExperimentSettings,
    base: Mapping[str, Any],
    where: str,
    *,
    only: Match | None = None,
    chosen: Mapping[tuple[str, ...], Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """The cells of an experiment's file.

    A cell's recipe is the base, then what its points say in the order of the axes, then the overrides that
    match it. ``only`` names points, or seeds, to which the grid is restricted. ``chosen`` are tables that a
    search found, by its group (:func:`group_of`); they yield to nothing. A baseline leaves out the sections
    that only a federated run has.

    Raises:
        RecipeError: a cell's recipe is not possible; names the cell. Or nothing is left.
    """
    points, only = settings.points(), only or {}
    try:
        check_match(only, {**points, "seed": list(map(str, settings.seeds))}, "--only")
    except ValueError as error:
        raise RecipeError(str(error)) from None

    def recipe_at(at: Points, seed: int) -> Recipe:
        return cell_recipe(settings, base, at, seed, where, (chosen or {}).get(group_of(settings, at), {}))

    def wanted(at: Points, seed: int) -> bool:
        place = {**at, "seed": str(seed)}
        return matches(only, place) and not any(matches(match, place) for match in settings.exclude)

    cells = grid(points, settings.seeds, recipe_at, wanted)
    if not cells:
        raise RecipeError(f"{where}: no cell is left")
    return cells


def cell_recipe(
    settings: ExperimentSettings,
    base: Mapping[str, Any],
    at: Mapping[str, str],
    seed: int,
    where: str,
    more: Mapping[str, Any],
) -> Recipe:
    """The recipe of one combination of points, with ``more`` laid over it.

    Raises:
        RecipeError: it is not possible.
    """
    points = settings.points()
    values: dict[str, Any] = dict(base)
    for axis, point in at.items():
        values = merged(values, points[axis][point])
    for override in settings.override:
        if matches(override.match, at):
            values = merged(values, override.set)
    values = merged(values, {**more, "seed": seed})
    if is_baseline(values):
        values = {key: value for key, value in values.items() if key not in FEDERATED_ONLY}
    return parse_recipe(values, f"{where}: cell {'--'.join(at.values())}")


def group_of(settings: ExperimentSettings, at: Mapping[str, str]) -> tuple[str, ...]:
    """The points on the axes for which learning rates are searched apart; empty without a search."""
    if settings.search is None:
        return ()
    return tuple(at[axis] for axis in search_axes(settings))


def search_axes(settings: ExperimentSettings) -> list[str]:
    """The axes of a search: its own, and those for whose points it is made anew."""
    search = settings.search
    return [search.axis, *(axis for axis in search.per if axis != search.axis)] if search else []


def parse_only(texts: Iterable[str]) -> Match:
    """``axis=point,point`` texts as points by axis.

    Raises:
        RecipeError: a text is not of that form.
    """
    found: Match = {}
    for text in texts:
        axis, sign, points = text.partition("=")
        if not sign or not points:
            raise RecipeError(f"--only {text!r}: write axis=point, or axis=point,point")
        found[axis.strip()] = [point.strip() for point in points.split(",")]
    return found


def without_seeds(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """The combinations of points, once each."""
    return list({tuple(cell.points.items()): cell.points for cell in cells}.values())
