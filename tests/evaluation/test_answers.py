"""Exact match and token F1 of short answers."""

from __future__ import annotations

import pytest

from fedcustom.evaluation.answers import exact_match, normalised, token_f1
from fedcustom.evaluation.metrics import text_metrics


def test_answers_are_compared_as_squad_does() -> None:
    assert normalised(" The  Eiffel-Tower,\nParis! ") == "eiffeltower paris"
    assert normalised("an atheist and a theory") == "atheist and theory"
    assert exact_match("the Answer.", ["no", "an answer"]) == 1
    assert exact_match("answers", ["answer"]) == 0


@pytest.mark.parametrize(
    ("text", "references", "wanted"),
    [
        ("Paris", ["Paris, France"], 2 * 1 * 0.5 / 1.5),
        ("it is in Paris", ["Rome", "in Paris"], 2 * 0.5 * 1 / 1.5),
        ("red red blue", ["red blue blue"], 2 / 3),  # each word counts as often as both have it
        ("", ["the"], 1),  # neither has a word
        ("", ["word"], 0),
        ("word", ["a"], 0),
    ],
)
def test_token_f1_is_that_of_the_best_reference(text: str, references: list[str], wanted: float) -> None:
    assert token_f1(text, references) == pytest.approx(wanted)


def test_both_are_percent_means_over_texts() -> None:
    metrics = text_metrics(["Paris", "the blue sky"], [["paris."], ["a sky", "sea"]])
    assert metrics["exact_match"] == pytest.approx(50)
    assert metrics["token_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
