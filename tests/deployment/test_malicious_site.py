"""What one malicious site tells, which must neither stop the run nor decide it alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedcustom.core.errors import RecipeError, UpdateError
from fedcustom.data.examples import Example
from fedcustom.deployment.connection import SiteFailure
from fedcustom.deployment.evaluation import RemoteEvaluation
from fedcustom.deployment.parties import check_generation
from fedcustom.deployment.replies import Part, PartSizes, SiteStatistics
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.evaluation.statistics import classification_statistics, mean_statistics
from fedcustom.recipe.recipe import load_recipe

CLASSIFIER = classification_statistics(np.array([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), [0, 1, 1])
LOSS = mean_statistics({"loss": 2.0}, {"loss": 30}, 3)
TEXTS = mean_statistics({"loss": 2.0, **dict.fromkeys(TEXT_METRICS, 5.0)}, {"loss": 30}, 3)


class Sites:
    """Two sound sites, and what ``late`` tells of an evaluation."""

    def __init__(
        self, task: str, sound: Mapping[str, Any], told: Mapping[str, Any], **evaluation: Any
    ) -> None:
        self.labels = ["a", "b"] if task == "classification" else []
        self.replies = {"north": sound, "south": sound, "late": told}
        self.notes: list[str] = []
        self.note = self.notes.append
        self.sizes = dict.fromkeys(self.replies, PartSizes(3, 3, 3))
        data = {"task": task}
        nothing: Any = None
        connection: Any = self
        method: Any = SimpleNamespace(keeps_parts=lambda: False)
        server: Any = SimpleNamespace(
            development=[],
            test=[],
            task=SimpleNamespace(kind=task, labels=self.labels, texts_are_scored=task == "generation"),
        )
        self.evaluation = RemoteEvaluation(
            load_recipe({"data": data, "method": {"name": "prefix"}, "evaluation": evaluation}), method,
            nothing, server, connection, connection, connection,
        )  # fmt: skip

    after = 1

    def evaluate(
        self, names: list[str], state: Any, part: Part, after: int, labels: int
    ) -> Iterator[tuple[str, SiteStatistics | SiteFailure]]:
        for name in names:
            try:
                yield name, SiteStatistics.from_values(self.replies[name], labels)
            except UpdateError as error:
                yield name, SiteFailure(str(error))


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"own": CLASSIFIER},
        {"whole": CLASSIFIER, "own": CLASSIFIER},
        {"whole": {**CLASSIFIER, "loss": -1e29}},
        {"whole": classification_statistics(np.zeros((4, 2)), [0, 0, 0, 0])},
    ],
)
def test_a_site_cannot_decide_an_evaluation_of_a_classifier(told: dict[str, Any]) -> None:
    nothing: Any = None
    sites, sound = (Sites("classification", {"whole": CLASSIFIER}, last) for last in (told, {}))
    for part in ("development", "test"):
        assert getattr(sites.evaluation, part)(nothing) == getattr(sound.evaluation, part)(nothing)
    assert sites.evaluation.final(nothing).metrics["accuracy"] == pytest.approx(2 / 3)
    assert all("late is left out of the evaluation" in note for note in sites.notes)
    assert len(sites.notes) == 3


@pytest.mark.parametrize(
    "sums",
    [
        {},
        {"loss": [60.0, 30]},
        {**TEXTS["sums"], "more": [1.0, 3]},
        {**TEXTS["sums"], "loss": [-1e29, 30]},
        {**TEXTS["sums"], "loss": [60.0, 2**49]},
        {**TEXTS["sums"], "bleu": [1e29, 3]},
        {**TEXTS["sums"], "bleu": [30.0, 2**49]},
    ],
)
def test_a_site_cannot_decide_an_evaluation_of_a_generator(sums: dict[str, Any]) -> None:
    nothing: Any = None
    sites = Sites("generation", {"whole": TEXTS}, {"whole": {"examples": 3, "sums": sums}})
    result = sites.evaluation.final(nothing)
    assert result.metrics == pytest.approx({"loss": 2.0, **dict.fromkeys(TEXT_METRICS, 5.0)})
    assert result.client_mean == pytest.approx(result.metrics)
    assert set(result.clients) == {"north", "south"}


def test_a_generator_is_measured_by_its_loss_while_it_trains() -> None:
    nothing: Any = None
    sites = Sites("generation", {"whole": LOSS}, {"whole": {"examples": 3, "sums": {}}})
    assert sites.evaluation.development(nothing) == {"loss": pytest.approx(2.0)}


@pytest.mark.parametrize("evaluation", [{"generate": False}, {"generate_limit": 2}])
def test_sites_write_no_texts_where_the_recipe_limits_them(evaluation: dict[str, Any]) -> None:
    nothing: Any = None
    sites = Sites("generation", {"whole": LOSS}, {"whole": TEXTS}, **evaluation)
    result = sites.evaluation.final(nothing)
    assert result.metrics == {"loss": pytest.approx(2.0)}
    assert set(result.clients) == {"north", "south"}
    assert not result.copy


def test_a_limit_of_texts_needs_test_rows_of_the_server() -> None:
    recipe = load_recipe({"data": {"task": "generation"}, "evaluation": {"generate_limit": 2}})
    check_generation(recipe, [Example("a", target="b")])
    with pytest.raises(RecipeError, match=r"evaluation\.generate_limit: counts the server's own test rows"):
        check_generation(recipe, [])
