"""What is kept of a run: one small JSON file, enough for every table, and to run it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import read_json, write_json
from ..federated.run_directory import History
from ..recipe.paths import from_here
from ..recipe.recipe import Recipe, recorded_recipe

MACHINE = ("processor", "cores", "threads", "accelerator", "python", "precision", "git_commit")


@dataclass(frozen=True)
class Result:
    """One finished run of an experiment.

    ``digest`` is that of its complete recipe, which stands in ``recipe`` without the defaults; ``command``
    makes it again. ``score`` is the best round's on the development split, by ``metric``; the other qualities
    are on the test split, with that round's state. ``curve`` has [round, development score, bytes sent so
    far, both ways] of each evaluated round. ``more`` holds what only some runs have: ``backdoor``,
    ``perturbed``, ``personalised``, ``copy``, ``degenerate``, ``temperature``, ``cuts``.
    """

    experiment: str
    points: dict[str, str]
    seed: int
    digest: str
    command: str
    baseline: str
    metric: str
    learning_rate: float | None
    score: float
    best_round: int
    rounds: int
    metrics: dict[str, float]
    untuned: dict[str, float]
    client_mean: dict[str, float]
    worst_client: dict[str, float]
    trainable_parameters: int
    head_parameters: int
    bytes: dict[str, int]
    seconds: dict[str, float]
    peak_memory_bytes: int
    curve: list[list[float]]
    machine: dict[str, Any]
    recipe: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """A result's file.

    Raises:
        RunError: it is missing, damaged or of another form.
    """
    content = read_json(path)
    try:
        return Result(**content)
    except TypeError as error:
        raise RunError(f"{path}: not a result of an experiment: {error}") from None


def result_paths(folder: Path) -> list[Path]:
    """The files of results in a folder, by name."""
    return sorted(path for path in folder.glob("*.json") if path.name != "search.json")


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, by name.

    Raises:
        RunError: there is none, or one is damaged.
    """
    paths = result_paths(folder)
    if not paths:
        raise RunError(f"{folder}: holds no results of an experiment")
    return [read_result(path) for path in paths]


def results_by_digest(folders: Iterable[Path]) -> dict[str, Result]:
    """The results in folders and in their ``search`` folders, by the digest of their recipe.

    Raises:
        RunError: one is damaged.
    """
    there = [
        path for folder in folders for part in (folder, folder / "search") for path in result_paths(part)
    ]
    return {result.digest: result for result in map(read_result, there)}


def has_result(path: Path, digest: str) -> bool:
    """Whether a file holds the result of the recipe with this digest."""
    return path.exists() and read_result(path).digest == digest


def write_result(path: Path, result: Result) -> None:
    """Write a result's file."""
    write_json(path, dataclasses.asdict(result))


def collect(
    directory: Path, *, experiment: str, points: Mapping[str, str], digest: str, command: str
) -> Result:
    """The result of a finished run, from its directory.

    Raises:
        RunError: a file is missing or damaged.
    """
    summary: dict[str, Any] = read_json(directory / "summary.json")
    recipe = recorded_recipe(directory / "recipe.toml")
    rows = [row for row in History.read(directory / "metrics.jsonl").rows if "development" in row]
    rows = [row for row in rows if row["round"] > 0]
    metric = recipe.metric
    best = next(row for row in rows if row["round"] == summary["best_round"])
    described = read_json(directory / "environment.json")
    return Result(
        experiment=experiment,
        points=dict(points),
        seed=recipe.seed,
        digest=digest,
        command=command,
        baseline=recipe.baseline,
        metric=metric,
        learning_rate=summary.get("search", {}).get("learning_rate", recipe.training.learning_rate),
        score=best["development"][metric],
        curve=[
            [row["round"], row["development"][metric], row["bytes_up_total"] + row["bytes_down_total"]]
            for row in rows
        ],
        machine={key: described.get(key) for key in MACHINE}
        | {"torch": described["packages"]["torch"], "transformers": described["packages"]["transformers"]},
        recipe=set_values(recipe),
        more={key: summary[key] for key in _ONLY_SOME if summary.get(key) is not None}
        | (_personalised(summary["personalised"]) if "personalised" in summary else {}),
        **{key: summary[key] for key in _COPIED},
    )


_ONLY_SOME = ("backdoor", "perturbed", "copy", "degenerate", "temperature", "cuts")

_COPIED = (
    "best_round", "rounds", "metrics", "untuned", "client_mean", "worst_client", "trainable_parameters",
    "head_parameters", "bytes", "seconds", "peak_memory_bytes",
)  # fmt: skip


def set_values(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets besides the defaults, with paths from the current folder: results are shared, and a
    run's own recipe names places of one machine.
    """
    values = from_here(recipe.identity.model_dump(exclude_defaults=True, exclude_none=True))
    return {**values, "method": {"name": recipe.method.name, **values.get("method", {})}}


def reached(result: Result, target: float) -> tuple[float, float] | None:
    """The first evaluated round whose development score is ``target`` or better, and the bytes sent until
    then; None where it is never reached.
    """
    from ..evaluation.metrics import LOWER_IS_BETTER

    lower = result.metric in LOWER_IS_BETTER
    for number, score, sent in result.curve:
        if (score <= target) if lower else (score >= target):
            return number, sent
    return None


def _personalised(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"personalised": {key: content[key] for key in ("client_mean", "worst_client")}}
