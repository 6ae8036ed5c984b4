"""The file of an experiment: a base recipe, axes of a grid, and how learning rates are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..core.errors import RecipeError, nearest
from ..core.settings import Settings
from ..data.settings import TaskKind
from ..evaluation.settings import (
    CLASSIFICATION_METRICS,
    GENERATION_METRICS,
    PREFERENCE_METRICS,
    RETRIEVAL_METRICS,
)
from ..methods.untuned.settings import SHOTS
from ..recipe.recipe import Baseline, read_toml

Added = Literal["centralised-probe", "federated-probe", "sums-probe", "embeddings", "zero-shot", "few-shot"]
"""Baselines that a file adds to its grid: four of classifiers, two of generators."""

BASELINE = "baseline"
"""The axis on which added baselines lie, in place of the file's axes that have no meaning for them."""

METRICS: dict[TaskKind, tuple[str, ...]] = {
    "classification": CLASSIFICATION_METRICS,
    "generation": GENERATION_METRICS,
    "chat": GENERATION_METRICS,
    "preference": PREFERENCE_METRICS,
    "retrieval": (*RETRIEVAL_METRICS, "clients_asked"),
}
"""What is measured on the test split."""

Match = dict[str, str | list[str]]
"""Points by axis: those cells are meant that lie on one of the points named, on each axis named."""


class SettingSweep(Settings):
    """An axis along which one setting of a recipe takes values; its points are named after them."""

    setting: str = Field(description="A recipe's setting, as in method.length")
    values: list[int | float | str | bool] = Field(min_length=1, description="Its values")


class CellOverride(Settings):
    """Settings of some cells, laid over what their points say."""

    match: Match = Field(description="Which cells")
    set: dict[str, Any] = Field(description="Tables of a recipe")


class RateOverride(Settings):
    """Rates of some cells, in place of the search's own: another optimiser wants others."""

    match: Match = Field(description="Which cells")
    rates: dict[str, list[float]] = Field(description="The rates to try, as many as elsewhere")


class SearchSettings(Settings):
    """A learning rate for each point of an axis, chosen on the development split."""

    axis: str = Field("method", description="The axis whose points each have a list of rates")
    rates: dict[str, list[float]] = Field(description="The rates to try, as many for every point")
    instead: list[RateOverride] = Field(default_factory=list, description="Other rates for some cells")
    per: list[str] = Field(
        default_factory=list, description="Axes for each of whose points the search is made anew"
    )
    at: dict[str, str] = Field(
        default_factory=dict, description="Where on other axes it is made; unset: at the first cell"
    )
    setting: str = Field("training.learning_rate", description="What is searched")
    seeds: list[int] = Field(
        default_factory=list, description="Seeds of the trials of each rate; unset: the first of seeds"
    )
    set: dict[str, Any] = Field(default_factory=dict, description="Tables of a recipe, for trials alone")

    @model_validator(mode="after")
    def _is_fair(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError(f"seeds = {self.seeds}: must be different numbers from 0")
        tables = {"rates": self.rates}
        tables |= {f"instead {n}": other.rates for n, other in enumerate(self.instead, 1)}
        counts = {f"{name}.{key}": len(rates) for name, t in tables.items() for key, rates in t.items()}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ValueError(f"rates: every method must have the same number of trials, not {counts}")
        for name, table in tables.items():
            if not table:
                raise ValueError(f"{name}: no rates are given")
            for point, rates in table.items():
                if len(set(rates)) < len(rates) or min(rates) <= 0:
                    raise ValueError(f"{name}.{point} = {rates}: must be different numbers above 0")
        return self

    def rates_at(self, at: Mapping[str, str]) -> list[float]:
        """The rates to try for a cell at these points: the last that are given for it."""
        found = self.rates[at[self.axis]]
        for other in self.instead:
            if matches(other.match, at):
                found = other.rates.get(at[self.axis], found)
        return found


class EstimateSettings(Settings):
    """Measured seconds a round, from which the time of cells is estimated before any has run."""

    axis: str = Field("method", description="The axis whose points take different times")
    seconds: dict[str, float] = Field(description="Seconds a round on one core, by point")
    times: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="By what that is multiplied on points of other axes"
    )


class ReportSettings(Settings):
    """How tables are laid out."""

    rows: list[str] = Field(default_factory=list, description="Axes whose points are a table's rows")
    columns: str | None = Field(
        None, description="The axis whose points are a table's columns; unset: the last that is no row"
    )
    metric: str | None = Field(None, description="The metric of the tables; unset: what rounds are chosen by")
    reference: Match = Field(
        default_factory=dict, description="The cells whose score others are to reach (centralised ones)"
    )
    same: list[str] = Field(
        default_factory=list, description="Axes on which a cell and its reference lie on one point"
    )
    against: list[dict[str, str]] = Field(
        default_factory=list,
        description="Points by axis: tables of differences to the cells there, paired by seed",
    )
    share: float = Field(0.95, gt=0, le=1, description="Which part of the reference's score is to be reached")


class ExperimentSettings(Settings):
    """One experiment. ``axes`` and ``sweeps`` are the grid, in the order of the file."""

    recipe: str | None = Field(None, description="A recipe to start from; its path is relative to this file")
    base: dict[str, Any] = Field(default_factory=dict, description="Tables of a recipe, for every cell")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1, description="Seeds of every cell")
    baselines: list[Added] = Field(
        default_factory=list,
        description="Baselines added for each model, data, partition and seed of the grid",
    )
    shots: int = Field(SHOTS, ge=1, le=1000, description="Examples in the context of the baseline few-shot")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="[axes.<axis>.<point>]: tables of a recipe"
    )
    sweeps: dict[str, SettingSweep] = Field(default_factory=dict, description="Axes of one setting each")
    exclude: list[Match] = Field(
        default_factory=list, description="Cells that are left out, by their points and seeds"
    )
    override: list[CellOverride] = Field(default_factory=list, description="Settings of some cells")
    search: SearchSettings | None = Field(None, description="Learning rates")
    estimate: EstimateSettings | None = Field(None, description="Seconds a round")
    report: ReportSettings = Field(default_factory=lambda: ReportSettings(), description="Tables")
    reuse: list[str] = Field(
        default_factory=list,
        description="Other experiments, by their names, whose results of the same recipe are taken over",
    )
    keep_models: bool = Field(
        False, description="Keep the models and checkpoints of finished cells, not their figures alone"
    )

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if not self.axes and not self.sweeps:
            raise ValueError("axes: name one axis at least, as in [axes.method.prefix]")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds = {self.seeds}: must be different numbers from 0")
        if both := self.axes.keys() & self.sweeps.keys():
            raise ValueError(f"sweeps.{min(both)}: there is such an axis already")
        points = self.points()
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines = {self.baselines}: must be different")
        if "shots" in self.model_fields_set and "few-shot" not in self.baselines:
            raise ValueError(f"shots = {self.shots}: needs the baseline 'few-shot'")
        if self.baselines and BASELINE in points:
            raise ValueError(f"axes.{BASELINE}: with baselines that is an axis already; name it otherwise")
        for axis, there in points.items():
            if axis == "seed" or not _is_name(axis):
                raise ValueError(f"axes.{axis}: not a name for an axis (letters, digits, . _ -, not seed)")
            if not there:
                raise ValueError(f"axes.{axis}: name one point at least")
            for point in there:
                if not _is_name(point):
                    raise ValueError(f"axes.{axis}.{point}: not a name (letters, digits, . _ and single -)")
        if bad := next((name for name in self.reuse if not _is_name(name)), None):
            raise ValueError(f"reuse: {bad!r} is no name of an experiment (its file's, without the ending)")
        seeds = {"seed": list(map(str, self.seeds))}
        for number, match in enumerate(self.exclude):
            check_match(match, {**points, **seeds}, f"exclude {number + 1}")
        for number, override in enumerate(self.override):
            check_match(override.match, points, f"override {number + 1}")
        check_match(self.report.reference, points, "report.reference")
        added: dict[str, Iterable[str]] = {BASELINE: self.baselines} if self.baselines else {}
        allowed = {**points, **added}
        for number, place in enumerate(self.report.against, 1):
            check_match({**place}, allowed, f"report.against {number}")
            if not place or (added and BASELINE in place and len(place) > 1):
                raise ValueError(f"report.against {number}: name points on axes, or a baseline alone")
        columns = [self.report.columns] if self.report.columns else []
        _check_axes([*self.report.rows, *columns, *self.report.same], points, "report")
        if columns and columns[0] in self.report.rows:
            raise ValueError(
                f"report.rows: {columns[0]!r} is the axis of the columns; name another as columns"
            )
        if self.search is not None:
            _check_axes([self.search.axis, *self.search.per, *self.search.at], points, "search")
            check_match({self.search.axis: list(self.search.rates)}, points, "search.rates")
            check_match(dict(self.search.at), points, "search.at")
            for number, other in enumerate(self.search.instead, 1):
                check_match(other.match, points, f"search.instead {number}")
                check_match({self.search.axis: list(other.rates)}, points, f"search.instead {number}.rates")
                meant = other.match.get(self.search.axis, list(other.rates))
                if out := other.rates.keys() - ({meant} if isinstance(meant, str) else set(meant)):
                    raise ValueError(f"search.instead {number}.rates.{min(out)}: is not among those matched")
                if apart := other.match.keys() - {self.search.axis, *self.search.per}:
                    raise ValueError(f"search.instead {number}: {min(apart)!r} is not among search.per")
            if missing := points[self.search.axis].keys() - self.search.rates.keys():
                raise ValueError(f"search.rates: none for {', '.join(sorted(missing))}")
        if self.estimate is not None:
            _check_axes([self.estimate.axis], points, "estimate")
            for axis, factors in self.estimate.times.items():
                check_match({axis: list(factors)}, points, "estimate.times")
        return self

    def layout(self) -> tuple[list[str], str | None]:
        """The axes of a table's rows, and that of its columns: where the file names none, the last that is
        not among the rows. It is None where rows are all axes, as they are by default where there is one.
        """
        axes, rows, columns = list(self.points()), self.report.rows, self.report.columns
        if not rows and columns is None and len(axes) == 1:
            return axes, None
        columns = columns or next((axis for axis in reversed(axes) if axis not in rows), None)
        return rows or [axis for axis in axes if axis != columns], columns

    def is_added(self, points: Mapping[str, object]) -> bool:
        """Whether these are the points of an added baseline, and no cell of the grid."""
        return bool(self.baselines) and BASELINE in points

    def points(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What each point of each axis says of a recipe, as tables."""
        swept = {
            axis: {_value_name(value): nested(sweep.setting, value) for value in sweep.values}
            for axis, sweep in self.sweeps.items()
        }
        return {**self.axes, **swept}


def load_experiment(path: Path) -> tuple[ExperimentSettings, dict[str, Any]]:
    """An experiment's file, and the tables of the recipe that its cells start from.

    Raises:
        RecipeError: a file cannot be read, a key is unknown, a name does not exist; one line.
    """
    content = read_toml(path)
    try:
        settings = ExperimentSettings.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error.errors()[0])}") from None
    if settings.recipe is None:
        return settings, settings.base
    from ..recipe.overrides import merged
    from ..recipe.paths import beside

    file = path.parent / settings.recipe
    base = beside(read_toml(file), file.parent, str(file), from_here=True)
    base.pop("compare", None)
    return settings, merged(base, settings.base)


def check_metric(report: ReportSettings, tasks: Iterable[TaskKind], where: str) -> None:
    """Refuse a metric that no cell measures.

    Raises:
        RecipeError: names what is allowed.
    """
    allowed = list(dict.fromkeys(metric for task in tasks for metric in METRICS[task]))
    if report.metric is not None and allowed and report.metric not in allowed:
        raise RecipeError(f"{where}: report.metric: {report.metric!r}{nearest(report.metric, allowed)}")


def check_match(
    match: Mapping[str, str | list[str]], points: Mapping[str, Iterable[str]], where: str
) -> None:
    """Refuse axes and points that do not exist.

    Raises:
        ValueError: names what is wrong and what is allowed.
    """
    _check_axes(match, points, where)
    for axis, wanted in match.items():
        there = list(points[axis])
        for point in [wanted] if isinstance(wanted, str) else wanted:
            if point not in there:
                raise ValueError(f"{where}: axis {axis!r} has no point {point!r}{nearest(point, there)}")


def matches(match: Mapping[str, str | list[str]], points: Mapping[str, str]) -> bool:
    """Whether a cell at ``points`` is meant."""
    return all(
        points[axis] == wanted if isinstance(wanted, str) else points[axis] in wanted
        for axis, wanted in match.items()
    )


def nested(setting: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for ``a.b``."""
    for part in reversed(setting.split(".")):
        value = {part: value}
    return dict(value)


def is_baseline(values: Mapping[str, Any]) -> bool:
    """Whether a recipe's tables are those of a baseline."""
    federated: Baseline = "federated"
    return bool(values.get("baseline", federated) != federated)


def _check_axes(axes: Iterable[str], points: Mapping[str, Any], where: str) -> None:
    for axis in axes:
        if axis not in points:
            raise ValueError(f"{where}: there is no axis {axis!r}{nearest(axis, list(points))}")


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+)*", text)) and not text.startswith(".")


def _value_name(value: int | float | str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = list(ExperimentSettings.model_fields) if len(problem["loc"]) == 1 else []
        return f"{key}: unknown setting" + (nearest(key, allowed) if allowed else "")
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should", "must")
    return f"{key}: {message}" if key else str(message)
