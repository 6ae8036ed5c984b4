"""Run directories, read into typed values. See docs/run_directory.md for the format."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from ..core.errors import RunError
from ..data.truncation import CutCount

Baseline = Literal["centralised", "federated", "local"]
T = TypeVar("T")


def _number(value: object) -> object:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_number)]
"""A float; JSON's ``null`` stands for a value that was not finite."""

Scores = dict[str, Number]

LARGEST_LOSS = 700.0
"""In nats a token; a float holds its exponential."""


@dataclass(frozen=True, slots=True)
class ByteCounts:
    """Bytes that a run sent: by one client in one round, and by all clients in all rounds; and those of one
    query to all clients that are asked, where a method searches them (NaN elsewhere).
    """

    up_per_client_round: Number = 0.0
    down_per_client_round: Number = 0.0
    up_total: Number = 0.0
    down_total: Number = 0.0
    up_per_query: Number = math.nan
    down_per_query: Number = math.nan


@dataclass(frozen=True, slots=True)
class Generated:
    """For how many ``texts`` of the test inputs a text was written."""

    texts: int
    of: int


@dataclass(frozen=True, slots=True)
class Promise:
    """What a run promises of privacy; ``valid`` is false where the noise can be repeated."""

    unit: str
    epsilon: float
    delta: float
    valid: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """``summary.json``: the result of a finished run. Keys that a report does not show are ignored. To the
    test scores of a generator the perplexity is added.
    """

    method: str
    baseline: Baseline
    task: str
    seed: int
    metrics: Scores
    model: str = ""
    data: str = ""
    rounds: int = 0
    best_round: int = 0
    labels: list[str] = field(default_factory=list)
    untuned: Scores = field(default_factory=dict)
    copy: Scores = field(default_factory=dict)
    degenerate: Scores = field(default_factory=dict)
    generated: Generated | None = None
    temperature: float | None = None
    client_mean: Scores = field(default_factory=dict)
    worst_client: Scores = field(default_factory=dict)
    clients: dict[str, Scores] = field(default_factory=dict)
    client_count: int | None = None
    truncation: dict[str, CutCount] = field(default_factory=dict)
    cuts: list[str] = field(default_factory=list)
    privacy: Promise | None = None
    trainable_parameters: int = 0
    head_parameters: int = 0
    bytes: ByteCounts = field(default_factory=ByteCounts)
    seconds: Scores = field(default_factory=dict)
    peak_memory_bytes: Number = math.nan


@dataclass(frozen=True, slots=True)
class Round:
    """One line of ``metrics.jsonl``. ``development`` is empty in a round that was not evaluated."""

    round: int
    development: Scores = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    cohort: list[str] = field(default_factory=list)
    late: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, Number] = field(default_factory=dict)
    bytes_down: dict[str, Number] = field(default_factory=dict)
    bytes_up_total: Number = 0.0
    bytes_down_total: Number = 0.0
    epsilon: float | None = None
    train_loss: Number = math.nan
    seconds: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of ``predictions.jsonl``: classification has ``text`` and ``label``, generation the other
    two.
    """

    prediction: str | int | float
    text: str = ""
    label: str | int | float | None = None
    source: str = ""
    references: list[str] | str = field(default_factory=list)
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    directory: Path
    name: str
    summary: Summary
    history: list[Round]
    recipe: str
    settings: dict[str, str]
    environment: dict[str, str]
    warnings: str
    deployed: bool = False


@dataclass(frozen=True, slots=True)
class UnfinishedRun:
    """A run without ``summary.json``; ``last_round`` is None where no round has ended."""

    directory: Path
    name: str
    last_round: int | None


@dataclass(frozen=True, slots=True)
class Runs:
    """All runs below some folders."""

    finished: list[Run]
    unfinished: list[UnfinishedRun]


_SUMMARY = TypeAdapter(Summary)
_ROUND = TypeAdapter(Round)
_PREDICTION = TypeAdapter(Prediction)
_OBJECT = TypeAdapter(dict[str, Any])


def _parse(adapter: TypeAdapter[T], content: bytes, where: str) -> T:
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{where}: {key + ': ' if key else ''}{first['msg']}") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from None


def parse_round(line: bytes, where: str) -> Round:
    """A line of ``metrics.jsonl``.

    Raises:
        RunError: it is malformed; the message begins with ``where``.
    """
    return _parse(_ROUND, line, where)


def _lines(adapter: TypeAdapter[T], path: Path, *, growing: bool = False) -> Iterator[T]:
    """The lines of a file. Of one that is ``growing`` a last line that is half written is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and (line.endswith(b"\n") or not growing):
                yield _parse(adapter, line, f"{path}, line {number}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and texts: ``{"a": {"b": 1}}`` becomes ``{"a.b": "1"}``."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


def _settings(recipe: str, path: Path) -> dict[str, str]:
    try:
        return flatten(tomllib.loads(recipe))
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path}: {error}") from None


def read_predictions(run: Run) -> Iterator[Prediction]:
    """The lines of ``predictions.jsonl``, read as they are asked for; none where the file is missing.

    Raises:
        RunError: a line is malformed; the message names file and line.
    """
    return _lines(_PREDICTION, run.directory / "predictions.jsonl")


def _with_perplexity(summary: Summary) -> Summary:
    """The summary of a generator with the perplexity beside the loss: its exponential, infinite where no
    float is as large.
    """
    if summary.task not in ("generation", "chat"):
        return summary

    def added(scores: Scores) -> Scores:
        if "loss" not in scores:
            return scores
        loss = scores["loss"]
        return {**scores, "perplexity": math.inf if loss > LARGEST_LOSS else math.exp(loss)}

    return replace(summary, metrics=added(summary.metrics), untuned=added(summary.untuned))


def read_summary(directory: Path) -> Summary:
    """The summary of a finished run.

    Raises:
        RunError: it is malformed.
    """
    result = directory / "summary.json"
    summary = _with_perplexity(_parse(_SUMMARY, _content(result), str(result)))
    if not summary.metrics:
        raise RunError(f"{result}: metrics: none was measured")
    return summary


def read_recipe(directory: Path) -> tuple[str, dict[str, str]]:
    """The recipe of a run, and its settings by dotted name; both empty where there is none.

    Raises:
        RunError: it is not TOML.
    """
    place = directory / "recipe.toml"
    text = _content(place).decode(errors="replace")
    return text, _settings(text, place)


def _read_run(directory: Path, name: str) -> Run | UnfinishedRun:
    history = list(_lines(_ROUND, directory / "metrics.jsonl", growing=True))
    if not (directory / "summary.json").exists():
        return UnfinishedRun(directory, name, max((line.round for line in history), default=None))
    summary = read_summary(directory)
    recipe, settings = read_recipe(directory)
    place = directory / "environment.json"
    environment: dict[str, Any] = _parse(_OBJECT, _content(place) or b"{}", str(place))
    return Run(
        directory=directory,
        name=name,
        summary=summary,
        history=history,
        recipe=recipe,
        settings=settings,
        environment=flatten(environment),
        warnings=_content(directory / "warnings.log").decode(errors="replace"),
        deployed=(directory / "run_id").exists(),
    )


def _find(root: Path) -> list[Path]:
    found = []
    for folder, inner, files in os.walk(root):
        inner.sort()
        if "summary.json" in files or "metrics.jsonl" in files:
            found.append(Path(folder))
            inner.clear()  # a run's own checkpoints and model hold no further runs
    return found


def read_runs(directories: Sequence[Path]) -> Runs:
    """Read all runs below ``directories``, each once; a directory may be a run directory itself.

    Raises:
        RunError: a folder is missing or holds no run, none of them holds a finished run, the runs are not of
        one task,
            or a file is malformed (the message names file, line and field).
    """
    finished: list[Run] = []
    unfinished: list[UnfinishedRun] = []
    seen: set[Path] = set()
    for root in directories:
        if not root.is_dir():
            raise RunError(f"{root}: no such folder")
        places = _find(root)
        if not places:
            raise RunError(f"{root}: no run in or below this folder (no summary.json)")
        for place in places:
            if place.resolve() in seen:
                continue
            seen.add(place.resolve())
            base = root if len(directories) == 1 and place != root else root.resolve().parent
            run = _read_run(place, place.resolve().relative_to(base.resolve()).as_posix())
            if isinstance(run, Run):
                finished.append(run)
            else:
                unfinished.append(run)
    if not finished:
        places_named = ", ".join(map(str, directories)) or "no folder was named"
        begun = f"; {len(unfinished)} unfinished" if unfinished else ""
        raise RunError(f"{places_named}: no finished run (no summary.json{begun})")
    tasks = sorted({run.summary.task for run in finished})
    if len(tasks) > 1:
        raise RunError(f"runs of different tasks cannot share a report: {', '.join(tasks)}")
    return Runs(finished, unfinished)
