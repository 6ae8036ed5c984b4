"""Baselines beside the cells of an experiment: probes of classifiers and prompts of the untuned model, which
are run once for all cells that share model, data, clients and seed; and what each run measures by the way,
its untuned model and copies of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..aggregation.settings import AggregationSettings
from ..core.errors import RecipeError, nearest
from ..methods.probe.settings import PROBE, ProbeSettings
from ..methods.untuned.settings import SHOTS, UNTUNED, UntunedSettings
from ..models.configuration import has_linear_head
from ..recipe.label_skew import why_no_head_fit
from ..recipe.recipe import Baseline, Recipe, load_recipe
from .grid import Cell, experiment_cells
from .results import Result
from .settings import BASELINE, ExperimentSettings, Match

SECTIONS = ("model", "data", "clients", "noise", "evaluation")
"""What an added baseline has of a cell's recipe, besides the seed and :data:`FIT`."""

FIT = "fit_head_least_texts"
"""The setting of ``[training]`` that a federated probe has too: what of the clients' sums is withheld."""

ENCODER = {"base": "builtin:minilm", "pooling": "mean"}
"""The sentence encoder whose vectors are classified whatever a cell's own model is."""

LONGEST = 512
"""Tokens of a text that it reads."""

TASKS: dict[str, tuple[str, ...]] = {
    "centralised-probe": ProbeSettings.tasks,
    "federated-probe": ProbeSettings.tasks,
    "sums-probe": ProbeSettings.tasks,
    "embeddings": ProbeSettings.tasks,
    "zero-shot": UntunedSettings.tasks,
    "few-shot": UntunedSettings.tasks,
}
"""The tasks that each of them is for."""


def deciding_axes(settings: ExperimentSettings) -> list[str]:
    """The axes on which added baselines differ: those whose points, or overrides that match on them, say
    something of a section that these have.
    """
    found = {axis for axis, points in settings.points().items() if any(map(_decides, points.values()))}
    found |= {axis for each in settings.override if _decides(each.set) for axis in each.match}
    return [axis for axis in settings.points() if axis in found]


def added_cells(
    settings: ExperimentSettings, base: Mapping[str, Any], where: str, *, only: Match | None = None
) -> tuple[list[Cell], list[str]]:
    """The baselines that the file asks for, one each for the cells of the grid that share its data and seed,
    and why some are not possible, a line each. Their points are those on axes that decide, and
    :data:`BASELINE`, on which ``only`` chooses too.

    Raises:
        RecipeError: ``only`` names what does not exist, or a recipe is not possible.
    """
    only = dict(only or {})
    wanted = only.pop(BASELINE, list(settings.baselines))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    for name in wanted:
        if name not in settings.baselines:
            raise RecipeError(
                f"--only: axis {BASELINE!r} has no point {name!r}{nearest(name, settings.baselines)}"
            )
    axes, found, reasons = deciding_axes(settings), dict[str, Cell](), list[str]()
    cells = experiment_cells(settings, base, where, only=only)
    for name in wanted:
        if not any(cell.recipe.data.task in TASKS[name] for cell in cells):
            reasons.append(f"no {name}: is for {' and '.join(TASKS[name])}, and no cell is")
    for cell in cells:
        for name in wanted:
            points = {BASELINE: name} | {axis: cell.points[axis] for axis in axes}
            added = Cell(points, cell.seed, cell.recipe)
            if added.name in found or cell.recipe.data.task not in TASKS[name]:
                continue
            try:
                found[added.name] = Cell(points, cell.seed, _added(cell.recipe, name, settings.shots))
            except RecipeError as error:
                reasons.append(f"no {'--'.join(points.values())}: {error}")
    return list(found.values()), list(dict.fromkeys(reasons))


def reference_rows(
    settings: ExperimentSettings, places: Mapping[tuple[str, str], Sequence[Result]], metric: str
) -> list[tuple[str, dict[str, float]]]:
    """Rows of a table of scores for the untuned model and for copies of the prompts: a name, and by column
    the mean over all results there. ``places`` are results by column and by the points of their row that
    decide; what nobody measured has no row.
    """
    kinds: list[tuple[str, Callable[[Result], Mapping[str, float]]]] = [
        ("untuned", lambda result: result.untuned),
        ("copy", lambda result: result.more.get("copy", {})),
    ]
    rows: dict[str, dict[str, float]] = {}
    for kind, scores in kinds:
        for (column, row), results in places.items():
            values = [scores(result).get(metric, math.nan) for result in results]
            if known := [value for value in values if not math.isnan(value)]:
                name = f"{row}, {kind}" if row else kind
                rows.setdefault(name, {})[column] = sum(known) / len(known)
    return list(rows.items())


def probe_recipe(recipe: Recipe, baseline: Baseline) -> Recipe:
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


def embeddings_recipe(recipe: Recipe) -> Recipe:
    """The recipe with logistic regression on mean-pooled vectors of a sentence encoder, all rows in one
    place, whatever its own model is: the solution is scikit-learn's.

    Raises:
        RecipeError: the task is no classification.
    """
    values = _shared(recipe)
    values["model"] = ENCODER | {key: values["model"][key] for key in ("dtype", "device")}
    values["data"] = {**values["data"], "max_length": min(LONGEST, recipe.data.max_length)}
    return probe_recipe(load_recipe(values), "centralised")


def untuned_recipe(recipe: Recipe, shots: int | None = None) -> Recipe:
    """The recipe with the untuned model as its method, and ``shots`` examples in its context; None: as many
    as ``[compare.untuned.method]`` says, or four. The model is evaluated once, and not before its round too.

    Raises:
        RecipeError: the task has no such baseline, or ``[compare.untuned]`` is not possible.
    """
    said = {name: tables for name, tables in recipe.compare.items() if name == UNTUNED}
    chosen = load_recipe({**_shared(recipe), "compare": said}).for_method(UNTUNED, "centralised")
    assert isinstance(chosen.method, UntunedSettings)
    method = chosen.method.model_copy(
        update={"shots": shots if shots is not None else chosen.method.shots or SHOTS}
    )
    evaluation = chosen.evaluation.model_copy(update={"untuned": False})
    return chosen.model_copy(update={"method": method, "evaluation": evaluation})


def _decides(table: Mapping[str, Any]) -> bool:
    """Whether tables of a recipe say something that an added baseline has."""
    return bool(table.keys() & {*SECTIONS}) or FIT in table.get("training", {})


def _added(recipe: Recipe, name: str, shots: int) -> Recipe:
    if name == "zero-shot" or name == "few-shot":
        return untuned_recipe(recipe, shots if name == "few-shot" else 0)
    if name == "embeddings":
        return embeddings_recipe(recipe)
    values = _shared(recipe)
    if name == "centralised-probe":
        return probe_recipe(load_recipe(values), "centralised")
    withheld = FIT in recipe.training.model_fields_set
    values["training"] = {FIT: getattr(recipe.training, FIT)} if withheld else {}
    if name == "sums-probe":
        values["training"]["fit_head_steps"] = 0
    return probe_recipe(load_recipe(values), "federated")


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The tables of a cell that its baselines have too, for one round."""
    values = recipe.model_dump(include={*SECTIONS, "seed", "tracking"}, exclude_none=True)
    return {**values, "rounds": {"count": 1}}
