"""Many runs from one recipe: methods, baselines and seeds, resumable."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .driver import run_recipe
from .errors import FedcustomError, RecipeError, nearest
from .progress import Progress
from .recipe import Baseline, Recipe

BASELINES: tuple[Baseline, ...] = ("centralised", "local")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: its name, its recipe and its directory."""

    name: str
    recipe: Recipe
    directory: Path


def comparison_cells(
    recipe: Recipe,
    out: Path,
    methods: Sequence[str],
    baselines: Sequence[str] = (),
    seeds: int = 1,
    *,
    baseline_methods: Sequence[str] | None = None,
) -> list[Cell]:
    """The runs of a comparison, baselines first, one directory ``<out>/[<baseline>-]<method>/seed-<n>`` each.

    Every method runs federated, with what the recipe's ``[compare.<method>]`` says of it. Baselines run with
    the methods in ``baseline_methods``, by default the recipe's own, and with what ``[compare.<baseline>]``
    says of them as well. Seeds count up from the recipe's.

    Raises:
        RecipeError: an unknown method or baseline, or settings that do not fit.
    """
    for name in baselines:
        if name not in BASELINES:
            raise RecipeError(f"--baselines: unknown baseline {name!r}{nearest(name, BASELINES)}")
    if not methods and not baselines:
        raise RecipeError("nothing to run: name methods or baselines")
    wanted: list[tuple[Baseline, str]] = [
        (baseline, method)
        for baseline in BASELINES
        if baseline in baselines
        for method in (baseline_methods or [recipe.method.name])
    ]
    wanted += [("federated", method) for method in dict.fromkeys(methods)]
    cells = []
    for baseline, method in wanted:
        chosen = recipe.for_method(method, baseline)
        name = method if baseline == "federated" else f"{baseline}-{method}"
        for seed in range(recipe.seed, recipe.seed + seeds):
            exact = chosen.model_copy(update={"baseline": baseline, "seed": seed})
            cells.append(Cell(f"{name}, seed {seed}", exact, out / name / f"seed-{seed}"))
    return cells


def run_cells(cells: Sequence[Cell], progress_for: Callable[[Cell], Progress]) -> dict[str, FedcustomError]:
    """Run all cells in turn; finished ones are not run again, unfinished ones go on where they stopped.

    Returns the cells that failed, by name, with the reason; the others are not held up by them.
    """
    failed: dict[str, FedcustomError] = {}
    for cell in cells:
        try:
            run_recipe(cell.recipe, cell.directory, resume=True, progress=progress_for(cell))
        except FedcustomError as error:
            failed[cell.name] = error
        gc.collect()
    return failed
