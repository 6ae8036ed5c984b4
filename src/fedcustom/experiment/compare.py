"""The experiment that writes itself from one recipe: methods by training (federated, centralised, local), and
what they have to beat: probes of classifiers, and the untuned model where texts are generated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from ..core.errors import RecipeError, RunError, nearest
from ..core.files import read_json
from ..federated.callbacks import Callback
from ..federated.tracking.group import Group
from ..methods.probe.settings import PROBE, ProbeSettings
from ..methods.untuned.settings import FEW_SHOT, ZERO_SHOT, UntunedSettings
from ..models.configuration import has_linear_head
from ..recipe.recipe import Baseline, Recipe
from .baselines import embeddings_recipe, probe_recipe, untuned_recipe
from .grid import Cell, Points, grid
from .runner import Job, run_jobs, tracked

BASELINES: tuple[Baseline, ...] = ("centralised", "local")
PROBED: tuple[Baseline, ...] = ("centralised", "federated")
"""How the probe is trained beside other methods."""

EMBEDDINGS = "embeddings"
"""The folder of the probe of a sentence encoder's vectors, whatever the recipe's model is."""

TRAINING, METHOD = "training", "method"
"""The two axes. A point of the first is a recipe's ``baseline``."""


def comparison_cells(
    recipe: Recipe,
    methods: Sequence[str],
    baselines: Sequence[str] = (),
    seeds: int = 1,
    *,
    baseline_methods: Sequence[str] | None = None,
) -> list[Cell]:
    """The runs of a comparison, baselines first.

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
    named = [baseline for baseline in BASELINES if baseline in baselines]
    return [
        *_cells(recipe, named, baseline_methods or [recipe.method.name], seeds),
        *_cells(recipe, ["federated"], methods, seeds),
    ]


def with_baselines(recipe: Recipe, seeds: int, cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells of a comparison behind those of what they have to beat, once a seed, unless they are among
    them; and why something of that is not possible, one line each.

    Classifiers have the probe, centralised and federated, and that of a sentence encoder's vectors where the
    model's own head cannot be fitted; where texts are generated there is the untuned model, zero-shot and
    few-shot. For other tasks there is nothing, and nothing is said.
    """
    asked = {label(cell) for cell in cells}
    added, reasons = list[Cell](), list[str]()
    for name, at, made in _to_beat(recipe):
        try:
            chosen = made()
        except RecipeError as error:
            reasons.append(f"no {name}: {error}")
            continue
        for seed in _seeds(recipe, seeds):
            cell = Cell(at, seed, chosen.model_copy(update={"seed": seed}), added=True)
            added += [cell] if label(cell) not in asked else []
    return [*added, *cells], reasons


def _to_beat(recipe: Recipe) -> Sequence[tuple[str, dict[str, str], Callable[[], Recipe]]]:
    """What methods have to beat: its name, its points, and what makes its recipe."""
    if recipe.data.task in ProbeSettings.tasks:
        trained = [(baseline, partial(probe_recipe, recipe, baseline)) for baseline in PROBED]
        probes = [(f"{name} probe", {TRAINING: name, METHOD: PROBE}, made) for name, made in trained]
        if has_linear_head(recipe.model):
            return probes
        return [*probes, (EMBEDDINGS, {METHOD: EMBEDDINGS}, partial(embeddings_recipe, recipe))]
    if recipe.data.task in UntunedSettings.tasks:
        shown = [(ZERO_SHOT, partial(untuned_recipe, recipe, 0)), (FEW_SHOT, partial(untuned_recipe, recipe))]
        return [(name, {METHOD: name}, made) for name, made in shown]
    return []


def label(cell: Cell) -> str:
    """What a comparison calls a run: ``lora, seed 0`` or ``centralised-lora, seed 0``."""
    return f"{_name(cell)}, seed {cell.seed}"


def run_directory(cell: Cell, out: Path) -> Path:
    """A run's directory: ``<out>/[<baseline>-]<method>/seed-<n>``; that of an added one has the name of
    what is added, as in ``<out>/few-shot/seed-0``.
    """
    return out / _name(cell) / f"seed-{cell.seed}"


def check_folder(out: Path, recipe: Recipe) -> None:
    """See that the comparison's page can be written over the runs that its folder holds already.

    Raises:
        RunError: one of them is of another task, or damaged.
    """
    for path in sorted(out.rglob("summary.json")):  # unfinished runs may end anywhere, and go on
        try:
            task = read_json(path)["task"]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}: is damaged; remove its run, or name another --out") from None
        if task != recipe.data.task:
            raise RunError(f"{out}: holds runs of {task}, not {recipe.data.task}; name another --out")


def run_comparison(
    cells: Sequence[Cell],
    out: Path,
    at_once: int = 1,
    *,
    progress_for: Callable[[str], Callback] | None = None,
    tell: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Run all cells; finished ones are not run again, unfinished ones go on where they stopped.

    Args:
        cells: The runs, in their order.
        out: The comparison's folder.
        at_once: Runs at the same time. With more than one, each is a process with its share of the cores.
        progress_for: Makes what is told of a run's progress, from its label; for runs in this process.
        tell: Told of each line that a run of another process shows of its progress.
        warn: Told where a tracker of all runs together does not answer.

    Returns the labels of cells that failed, with the reason; the others are not held up by them.
    """
    failed: dict[str, str] = {}
    group = Group(out, out.name, warn)

    def done(job: Job, reason: str | None) -> None:
        if reason is not None:
            failed[job.name] = reason

    def told(job: Job, line: str) -> None:
        assert tell is not None
        own = f"{job.recipe.baseline} {job.recipe.method.name}: "  # the name of a run that has none
        tell(f"{job.name}: {line.removeprefix(own)}")

    run_jobs(
        [
            Job(label(cell), tracked(cell.recipe, group, label(cell)), run_directory(cell, out))
            for cell in cells
        ],
        at_once,
        done,
        progress_for=None if progress_for is None else lambda job: progress_for(job.name),
        tell=None if tell is None else told,
        threads=max(1, (os.cpu_count() or 1) // at_once),
    )
    return failed


def _cells(recipe: Recipe, trainings: Sequence[Baseline], methods: Sequence[str], seeds: int) -> list[Cell]:
    """The runs of these methods, trained in each of these ways."""

    def recipe_at(at: Points, seed: int) -> Recipe:
        baseline = cast(Baseline, at[TRAINING])
        chosen = recipe.for_method(at[METHOD], baseline)
        return chosen.model_copy(update={"baseline": baseline, "seed": seed})

    return grid({TRAINING: trainings, METHOD: list(dict.fromkeys(methods))}, _seeds(recipe, seeds), recipe_at)


def _seeds(recipe: Recipe, count: int) -> range:
    return range(recipe.seed, recipe.seed + count)


def _name(cell: Cell) -> str:
    training, method = cell.points.get(TRAINING, "federated"), cell.points[METHOD]
    return method if training == "federated" else f"{training}-{method}"
