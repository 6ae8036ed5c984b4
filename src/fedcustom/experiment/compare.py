"""Many runs from one recipe: methods, baselines and seeds, resumable."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..aggregation.settings import AggregationSettings
from ..core.errors import FedcustomError, RecipeError, nearest
from ..federated.callbacks import Callback
from ..federated.run import run_recipe
from ..methods.probe.settings import PROBE, ProbeSettings
from ..models.load import has_linear_head
from ..recipe.label_skew import why_no_head_fit
from ..recipe.recipe import Baseline, Recipe

BASELINES: tuple[Baseline, ...] = ("centralised", "local")
PROBED: tuple[Baseline, ...] = ("centralised", "federated")
"""How the probe is run beside other methods."""


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: its name, its recipe and its directory. Nobody asked for one that is
    ``added``: if it fails, that is no failure of the comparison.
    """

    name: str
    recipe: Recipe
    directory: Path
    added: bool = False


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


def with_probes(recipe: Recipe, out: Path, seeds: int, cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells of a comparison behind those of the probe, centralised and federated, once a seed, unless
    they are among them; and why some probe is not possible, one line each.

    For what is no classification there is none, and nothing is said.
    """
    if recipe.data.task != "classification":
        return list(cells), []
    there, added, reasons = {cell.directory for cell in cells}, list[Cell](), list[str]()
    for baseline in PROBED:
        name = PROBE if baseline == "federated" else f"{baseline}-{PROBE}"
        try:
            probe = probe_of(recipe, baseline)
        except RecipeError as error:
            reasons.append(f"no {baseline} probe: {error}")
            continue
        for seed in range(recipe.seed, recipe.seed + seeds):
            directory = out / name / f"seed-{seed}"
            if directory not in there:
                exact = probe.model_copy(update={"seed": seed})
                added.append(Cell(f"{name}, seed {seed}", exact, directory, added=True))
    return [*added, *cells], reasons


def probe_of(recipe: Recipe, baseline: Baseline) -> Recipe:
    """The recipe with the probe as its method, which the other methods have to beat.

    Raises:
        RecipeError: it is not possible; the message says why.
    """
    if not has_linear_head(recipe.model):
        raise RecipeError("the model's classification head is not known to end in one linear layer")
    merged = recipe.model_copy(update={"method": ProbeSettings()})
    if baseline == "federated" and (reason := why_no_head_fit(merged)):
        raise RecipeError(reason)
    probe = recipe.for_method(PROBE, baseline)
    if baseline != "federated":  # one client has all data: nothing is merged
        probe = probe.model_copy(update={"aggregation": AggregationSettings()})
    return probe


def run_cells(cells: Sequence[Cell], progress_for: Callable[[Cell], Callback]) -> dict[str, FedcustomError]:
    """Run all cells in turn; finished ones are not run again, unfinished ones go on where they stopped.

    Returns the cells that failed, by name, with the reason; the others are not held up by them.
    """
    failed: dict[str, FedcustomError] = {}
    for cell in cells:
        try:
            run_recipe(cell.recipe, cell.directory, resume=True, callbacks=[progress_for(cell)])
        except FedcustomError as error:
            failed[cell.name] = error
        gc.collect()
    return failed
