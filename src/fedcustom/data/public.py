"""The public set: unlabelled texts that server and clients all hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..core.errors import DataError
from .cells import Row, place_of
from .examples import Example, input_of
from .settings import DataSettings, PublicSettings
from .sources import read_rows, require_columns
from .templates import fields


def read_public(settings: PublicSettings, data: DataSettings) -> list[Example]:
    """The texts of the public set that a recipe names; none where it names none.

    Raises:
        DataError: the source cannot be read, has no such column, or a row of it is empty.
    """
    if settings.source is None:
        return []
    where = f"public set {settings.source}, {settings.split}"
    rows = read_rows(data.model_copy(update={"source": settings.source, "subset": None}), settings.split)
    require_columns(rows, fields(public_template(settings, data)), where)
    return public_examples(rows, settings, data, where)


def public_examples(
    rows: Sequence[Row], settings: PublicSettings, data: DataSettings, where: str
) -> list[Example]:
    """Rows as texts without labels.

    Raises:
        DataError: a value that the template names is empty or no plain value; names line and column.
    """
    template = public_template(settings, data)
    return [input_of(template, row, f"{where}, {place_of(row, n)}") for n, row in enumerate(rows)]


def public_template(settings: PublicSettings, data: DataSettings) -> str:
    """The template of the public texts: their own, or that of the task's inputs."""
    return settings.text or (data.text if data.task == "classification" else data.prompt)


def set_aside(count: int, fraction: float, seed: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of ``count`` rows that stay with the clients, and of those that become public."""
    order = np.random.default_rng(list(seed)).permutation(count).tolist()
    size = int(fraction * count)
    return sorted(order[size:]), sorted(order[:size])


def without_overlap(public: list[Example], scored: Iterable[Example]) -> list[Example]:
    """The public texts that are not among the scored ones (but for case and space)."""
    known = {_plain(example.text) for example in scored}
    return [example for example in public if _plain(example.text) not in known]


def refuse_overlap(public: list[Example], scored: Iterable[Example], where: str) -> None:
    """Refuse a public set that holds test inputs: what is learnt on it would be measured on it.

    Raises:
        DataError: says how many there are and names the first.
    """
    clean = {id(example) for example in without_overlap(public, scored)}
    shared = [(number, e) for number, e in enumerate(public, start=1) if id(e) not in clean]
    if shared:
        number, example = shared[0]
        raise DataError(
            f"public set {where}: {len(shared)} of its {len(public)} texts are test or development inputs, "
            f"the first in row {number}: {example.text[:60]!r}; a public set must not overlap them"
        )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
