"""Checks of clients' answers in a search."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PolicyError, UpdateError
from ...core.tensors import is_finite
from ..messages import Task, Update, typed
from .client import BYTES
from .messages import (
    AnswerTask,
    AnswerUpdate,
    CalibrateTask,
    CountTask,
    CountUpdate,
    FetchTask,
    FetchUpdate,
    IndexTask,
    IndexUpdate,
    RetrieveTask,
    RouteTask,
    RouteUpdate,
)
from .settings import RetrievalSettings

LONGEST_TEXT = 100_000


def check_answer(task: Task, update: Update, width: int) -> None:
    """Refuse an answer that is not one to its task.

    Raises:
        UpdateError: says what is wrong.
    """
    if not is_finite({n: t for n, t in update.tensors.items() if t.is_floating_point()}):
        raise UpdateError("an answer holds numbers that are not finite")
    match task:
        case CountTask():
            _count("documents", typed(update, CountUpdate).documents)
        case IndexTask():
            _count("documents", typed(update, IndexUpdate).documents)
            _count("chunks", typed(update, IndexUpdate).chunks)
        case RouteTask():
            _route(typed(update, RouteUpdate), width)
        case CalibrateTask():
            _calibrate(update)
        case RetrieveTask():
            _retrieve(task, update)
        case FetchTask():
            _fetch(task, typed(update, FetchUpdate))
        case _:
            _text(typed(update, AnswerUpdate).answer)


def _count(key: str, number: Any) -> None:
    if type(number) is not int or number < 0:
        raise UpdateError(f"{key} {number!r} is not a number of {key}")


def _route(update: RouteUpdate, width: int) -> None:
    wanted = {"total": (width,), "scatter": (width, width)}
    for name, shape in wanted.items():
        _shape(update, name, shape, torch.float64)
    questions = update.questions
    if type(questions) is not int or questions < 1:
        raise UpdateError(f"questions {questions!r} is not a positive integer")
    total, scatter = update.tensors["total"], update.tensors["scatter"]
    # The vectors have length 1, so that their squares add up to their number.
    if abs(float(scatter.trace()) - questions) > 1e-3 * questions or total.norm() > 1.001 * questions:
        raise UpdateError("sums are not those of so many unit vectors")
    if not torch.allclose(scatter, scatter.T, atol=1e-6 * questions):
        raise UpdateError("scatter is not symmetric")


def _calibrate(update: Update) -> None:
    masses = update.tensors.get("masses")
    if masses is None or masses.dim() != 1 or masses.dtype != torch.float64 or len(masses) > 10**7:
        raise UpdateError("masses must be one list of float64 numbers")
    if len(masses) and not (masses.min() >= 0 and masses.max() <= 1 + 1e-9):
        raise UpdateError("masses must lie between 0 and 1")


def _retrieve(task: RetrieveTask, update: Update) -> None:
    top = task.top
    rows = {}
    if "queries" in task.tensors:
        rows["vector"] = len(task.tensors["queries"])
    if task.texts is not None:
        rows["text"] = len(task.texts)
    parts = {"scores": ((), torch.float32), "documents": ((BYTES,), torch.uint8)}
    for way, count in rows.items():
        for name, (more, dtype) in parts.items():
            _shape(update, f"{way}/{name}", (count, top, *more), dtype)
        counts = _shape(update, f"{way}/counts", (count,), torch.int64)
        if count and not (counts.min() >= 0 and counts.max() <= top):
            raise UpdateError(f"counts of documents must lie between 0 and {top}")
        for number, names in zip(counts.tolist(), update.tensors[f"{way}/documents"], strict=True):
            if len({bytes(name) for name in names[:number].tolist()}) != number:
                raise UpdateError("a list names a document twice")
        for row, number in enumerate(counts.tolist()):
            _scores(update.tensors[f"{way}/scores"][row, :number], _largest(task, way, row))
    extra = {name.partition("/")[0] for name in update.tensors} - rows.keys()
    if extra:
        raise UpdateError(f"lists that were not asked for: {', '.join(sorted(extra))}")


def _largest(task: Task, way: str, row: int) -> float:
    """The largest score that there can be: a query's inner product with a unit vector; BM25 has none."""
    return math.inf if way == "text" else 1e-4 + 1.0001 * float(task.tensors["queries"][row].norm())


def _scores(scores: Tensor, largest: float) -> None:
    if len(scores) and not (scores.abs() <= largest).all():
        raise UpdateError(f"a score lies beyond {largest:.4g}, the largest that there can be")
    if (scores[1:] > scores[:-1]).any():
        raise UpdateError("a list does not begin with the best")


def _fetch(task: FetchTask, update: FetchUpdate) -> None:
    passages = update.passages
    if not isinstance(passages, dict) or set(passages) != set(task.documents):
        raise UpdateError("passages must be those that were asked for")
    for text in passages.values():
        _text(text)


def _text(text: Any) -> None:
    if not isinstance(text, str) or len(text) > LONGEST_TEXT:
        raise UpdateError(f"a text is missing or longer than {LONGEST_TEXT} characters")


def _shape(update: Update, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = update.tensors.get(name)
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype))
        raise UpdateError(f"{name} is {found}, not {(shape, str(dtype))}")
    return tensor


def check_search(settings: RetrievalSettings, task: Task) -> None:
    """Refuse a search that asks for more than the recipe's.

    Raises:
        PolicyError: names what the task asks for, and what the recipe says.
    """
    if isinstance(task, RetrieveTask):
        if task.top != settings.top:
            raise PolicyError(f"top = {task.top}: the recipe says method.top = {settings.top}")
        if task.texts is not None and settings.search == "vector":
            raise PolicyError(f"texts: the recipe says method.search = {settings.search!r}")
        vectors = task.tensors.get("queries")
        if vectors is not None and (settings.search == "text" or vectors.dim() != 2):
            raise PolicyError(f"queries: the recipe says method.search = {settings.search!r}")
    elif isinstance(task, FetchTask | AnswerTask):
        fetches = isinstance(task, FetchTask)
        most = settings.top if fetches else min(settings.top, settings.passages_given)
        if not 1 <= len(task.documents) <= most:
            raise PolicyError(f"documents: the recipe asks for at most {most} in an answer to one query")
        if len(set(task.documents)) < len(task.documents):
            raise PolicyError("documents: one is named twice")
    elif isinstance(task, CalibrateTask):
        bias = task.tensors.get("bias")
        if bias is None or bias.dim() != 1 or task.own >= len(bias):
            raise PolicyError("own: must be the number of a client")
