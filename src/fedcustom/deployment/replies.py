"""Replies of a site about its data and about a state: their types, shared by both ends, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..core.errors import UpdateError
from ..evaluation.statistics import Statistics, check_statistics

Part = Literal["train", "development", "test"]

Label = str | int | float

MAX_LABELS, MAX_LABEL_CHARACTERS = 10_000, 100
"""Of a run: labels, and the length of one; sites open no run with more."""


@dataclass(frozen=True)
class LabelList:
    """Labels that occur in a site's data, and its number of rows; the reply to ``describe``."""

    labels: list[Label]
    rows: int = 0

    def to_values(self) -> dict[str, Any]:
        """The values of the message."""
        return {"labels": self.labels, "rows": self.rows}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> LabelList:
        """Read a message; a list that holds anything but texts and numbers counts as empty.

        Raises:
            UpdateError: there are more labels than a run may have, or one is empty or too long. Other sites
                would not open a run with them.
        """
        labels = values.get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, Label) for label in labels):
            labels = []
        if len(labels) > MAX_LABELS:
            raise UpdateError(f"has {len(labels)} labels; at most {MAX_LABELS} are allowed")
        if any(not 0 < len(str(label)) <= MAX_LABEL_CHARACTERS for label in labels):
            raise UpdateError(f"has a label that is empty or longer than {MAX_LABEL_CHARACTERS} characters")
        return cls(labels, _count(values.get("rows")))


@dataclass(frozen=True)
class PartSizes:
    """Number of examples in each part of a site's data; the reply to ``open``."""

    train: int = 0
    development: int = 0
    test: int = 0

    def of(self, part: Part) -> int:
        """Number of examples in one part."""
        return {"train": self.train, "development": self.development, "test": self.test}[part]

    def to_values(self) -> dict[str, Any]:
        """The values of the message."""
        return {"sizes": asdict(self)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> PartSizes:
        """Read a message; what is no plausible number counts as 0."""
        sizes = values.get("sizes")
        counts = sizes if isinstance(sizes, dict) else {}
        return cls(**{field.name: _count(counts.get(field.name)) for field in fields(cls)})


@dataclass(frozen=True)
class SiteStatistics:
    """Evaluation statistics of a state on one part of a site's data; the reply to ``evaluate``.

    Attributes:
        global_model: of the global model (``whole`` in the message), if it was evaluated.
        personalised: of the site's own version of the model (``own`` in the message), if it has one.
    """

    global_model: Statistics | None = None
    personalised: Statistics | None = None

    def to_values(self) -> dict[str, Any]:
        """The values of the message."""
        values = {"whole": self.global_model, "own": self.personalised}
        return {key: statistics for key, statistics in values.items() if statistics is not None}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], labels: int) -> SiteStatistics:
        """Read a message. ``labels`` is the number of labels, 0 for anything but classification.

        Raises:
            UpdateError: the statistics are unsound.
        """
        try:
            checked = {
                key: check_statistics(values[key], labels) for key in ("whole", "own") if key in values
            }
        except (TypeError, AttributeError, OverflowError) as error:
            raise UpdateError(str(error)) from None
        return cls(checked.get("whole"), checked.get("own"))


def _count(value: Any) -> int:
    """A plausible number of examples, or 0."""
    return value if type(value) is int and 0 <= value < 2**40 else 0
