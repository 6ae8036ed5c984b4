"""The first test examples of a run, with what its model made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from . import formatting as words
from .groups import Group
from .plots import colour
from .read import Prediction, read_predictions

EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class Example:
    """One test example as it is shown; ``correct`` is None where right and wrong do not apply."""

    given: str
    expected: list[str]
    prediction: str
    probability: str
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Examples:
    """The first test examples of one run."""

    label: str
    paint: str
    shown: list[Example]


def _example(line: Prediction) -> Example:
    classified = line.label is not None
    references = [line.references] if isinstance(line.references, str) else line.references
    return Example(
        given=words.shortened(line.text or line.source),
        expected=[str(line.label)] if classified else [words.shortened(text) for text in references],
        prediction=words.shortened(str(line.prediction)),
        probability="" if line.probability is None else f"{line.probability:.2f}",
        correct=str(line.label) == str(line.prediction) if classified else None,
    )


def first_examples(groups: Sequence[Group], first: Group) -> list[Examples]:
    """Of the first run of each group; those of the group ``first`` come first."""
    shown = []
    for group in sorted(groups, key=lambda group: group is not first):
        run = group.runs[0]
        items = [_example(line) for line in islice(read_predictions(run), EXAMPLES)]
        if items:
            shown.append(Examples(words.run_title(group, run), colour(group.method, groups), items))
    return shown
