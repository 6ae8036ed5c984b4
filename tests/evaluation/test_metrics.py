"""Metrics against hand-made figures and independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from fedcustom.evaluation.metrics import (
    classification_metrics,
    client_mean,
    is_better,
    text_metrics,
    token_loss,
    worst_client,
)
from fedcustom.evaluation.settings import TEXT_METRICS


def test_classification_by_hand() -> None:
    # Predictions 0, 1, 1, 2 for labels 0, 1, 2, 2.
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    metrics = classification_metrics(logits, torch.tensor([0, 1, 2, 2]))
    assert metrics["accuracy"] == 0.75
    # F1 of class 0: 1; of class 1: precision 1/2, recall 1 -> 2/3; of class 2: precision 1, recall 1/2 ->
    # 2/3.
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    right = -math.log(math.exp(2) / (math.exp(2) + 2))
    wrong = -math.log(1 / (math.exp(2) + 2))
    assert metrics["loss"] == pytest.approx((3 * right + wrong) / 4)


def test_f1_counts_only_labels_that_occur() -> None:
    metrics = classification_metrics(torch.tensor([[2.0, 0, 0, 0]] * 3), torch.tensor([0, 0, 0]))
    assert metrics["macro_f1"] == 1.0


def test_f1_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        labels, rows = int(generator.integers(2, 9)), int(generator.integers(1, 40))
        true, chosen = generator.integers(0, labels, (2, rows))
        logits = torch.nn.functional.one_hot(torch.from_numpy(chosen), labels).double()
        expected = f1_score(true, chosen, average="macro", zero_division=0.0)
        assert classification_metrics(logits, torch.from_numpy(true))["macro_f1"] == expected


def test_texts_that_equal_one_of_several_references_are_perfect() -> None:
    references = [["the cat is here now", "a cat is here"], ["a dog sat on the mat"]]
    metrics = text_metrics(["a cat is here", "a dog sat on the mat"], references)
    assert metrics == pytest.approx(dict.fromkeys(TEXT_METRICS, 100))


def test_rouge_takes_the_best_reference() -> None:
    # Longest common subsequence "a b": precision 2/3, recall 2/2 -> F 0.8; with the other reference less.
    assert text_metrics(["a b c"], [["a b", "x y"]])["rouge_l"] == pytest.approx(80)


def test_bleu_against_the_formula() -> None:
    # Unigrams 4/4, bigrams 2/3, trigrams 0 and four-grams 0 (smoothed exponentially), no brevity penalty.
    metrics = text_metrics(["a b d c"], [["a b c d"]])
    expected = 100 * (1.0 * (1 / 3) * (1 / (2 * 2)) * (1 / (4 * 1))) ** 0.25
    assert metrics["bleu"] == pytest.approx(expected)


def test_token_loss_is_per_token_not_per_example() -> None:
    assert token_loss([3.0, 1.0], [1, 3]) == 1.0


def test_clients() -> None:
    clients = {"a": {"accuracy": 0.5, "loss": 1.0}, "b": {"accuracy": 0.9, "loss": 3.0}}
    assert client_mean(clients) == pytest.approx({"accuracy": 0.7, "loss": 2.0})
    assert worst_client(clients) == {"accuracy": 0.5, "loss": 3.0}
    assert client_mean({}) == worst_client({}) == {}


def test_what_is_better() -> None:
    assert is_better(0.9, 0.8, "accuracy")
    assert is_better(0.8, 0.9, "loss")
    assert not is_better(0.8, 0.8, "loss")
