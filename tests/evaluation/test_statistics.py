"""What sites tell of their examples: a share is at most one an example; choices count those with options."""

from __future__ import annotations

from typing import Any

import pytest

from fedcustom.core.errors import UpdateError
from fedcustom.evaluation.statistics import check_statistics, mean_statistics, pooled_metrics


def test_choices_are_weighted_by_the_examples_that_have_options() -> None:
    parts = [
        check_statistics(mean_statistics({"loss": 1.0, "choice_accuracy": share}, counts, examples), 0)
        for share, counts, examples in (
            (1.0, {"loss": 20, "choice_accuracy": 2}, 10),
            (0.25, {"loss": 60, "choice_accuracy": 8}, 8),
        )
    ]
    assert pooled_metrics(parts)["choice_accuracy"] == pytest.approx((2 * 1.0 + 8 * 0.25) / 10)


@pytest.mark.parametrize(
    "sums",
    [
        {"choice_accuracy": [3.0, 2]},
        {"choice_accuracy": [2.0, 4]},
        {"preference_accuracy": [3.1, 3]},
        {"preference_accuracy": [1.0, 2]},
        {"likelihood_accuracy": [300.0, 3]},
        {"bleu": [301.0, 3]},
    ],
)
def test_no_site_is_right_more_often_than_it_has_examples(sums: dict[str, Any]) -> None:
    with pytest.raises(UpdateError, match="is no sum of the examples"):
        check_statistics({"examples": 3, "sums": {"loss": [3.0, 30], **sums}}, 0)
