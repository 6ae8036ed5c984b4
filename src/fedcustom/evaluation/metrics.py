"""Accuracy, macro-F1 and loss of a classifier; BLEU, chrF, ROUGE-L and loss of a generator; accuracy and
margin of preferences; means and worst clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .answers import exact_match, token_f1
from .calibration import expected_calibration_error, reliability

Metrics = dict[str, float]

LOWER_IS_BETTER = frozenset({"loss", "clients_asked", "calibration_error"})
RANKS = 10
"""The ranks that count in the mean reciprocal rank."""


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Accuracy and macro-F1 (0 to 1), mean loss (nats) and expected calibration error (0 to 1).

    ``logits`` is (examples, labels) and ``labels`` (examples,); there must be one example at least.
    F1 is averaged over the labels that occur or were predicted.
    """
    from torch.nn.functional import cross_entropy

    predicted = logits.argmax(dim=1)
    return {
        "accuracy": float((predicted == labels).double().mean()),
        "macro_f1": _macro_f1(labels.numpy(), predicted.numpy()),
        "loss": float(cross_entropy(logits.double(), labels)),
        "calibration_error": expected_calibration_error(
            reliability(logits.double().numpy(), labels.tolist())
        ),
    }


def _macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """The mean of 2 TP / (2 TP + FP + FN) over the labels that occur or were predicted. (scikit-learn takes
    milliseconds for it, which adds up over thousands of clients.)
    """
    size = int(max(true.max(), predicted.max())) + 1
    hits = np.bincount(true[true == predicted], minlength=size)
    named = np.bincount(true, minlength=size) + np.bincount(predicted, minlength=size)
    seen = named > 0
    return float(np.mean(2 * hits[seen] / named[seen]))


def text_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Metrics:
    """Corpus BLEU and chrF (``sacrebleu``), and means over the texts of ROUGE-L (F-measure), exact match and
    token F1 (:mod:`.answers`), each by the best of the references; all 0 to 100.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    # sacrebleu wants one stream a reference position; where an example has fewer, None leaves it out.
    width = max(len(texts) for texts in references)
    streams: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(width)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(predictions, references, strict=True))
    rouge = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in texts)
        for prediction, texts in pairs
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(predictions), streams).score),
        "chrf": float(sacrebleu.corpus_chrf(list(predictions), streams).score),
        "rouge_l": 100 * float(np.mean(rouge)),
        "exact_match": 100 * float(np.mean([exact_match(*pair) for pair in pairs])),
        "token_f1": 100 * float(np.mean([token_f1(*pair) for pair in pairs])),
    }


def retrieval_metrics(ranks: Sequence[int], asked: Sequence[float]) -> Metrics:
    """Recall at 1, 5 and 10 and MRR@10, all 0 to 1, from the rank of each question's document (0 where it was
    not found); and the mean share of clients that were asked.

    MRR@10 is the mean of 1 / rank, with 0 for ranks beyond 10: a search knows no more of them than that, and
    where more is known, figures stay comparable.
    """
    places = np.array([rank if rank > 0 else np.inf for rank in ranks])
    recall = {f"recall_at_{k}": float((places <= k).mean()) for k in (1, 5, 10)}
    reciprocal = np.where(places <= RANKS, 1 / places, 0.0)
    return {**recall, "mrr": float(reciprocal.mean()), "clients_asked": float(np.mean(asked))}


def preference_metrics(scores: np.ndarray[Any, np.dtype[np.float64]]) -> Metrics:
    """Of preference pairs with the (pairs, 3) ``scores`` loss, reward margin and log-likelihood of the chosen
    answer less that of the rejected one, in nats: the mean ``loss``; ``preference_accuracy``, the share of
    pairs whose chosen answer has the larger implicit reward; ``reward_margin``, the mean margin;
    ``likelihood_accuracy``, the share whose chosen answer is the likelier one.

    A tie counts as half: a model that is the reference model has an accuracy of 0.5. The implicit reward of
    an answer is beta (log p - log p_reference) (Rafailov et al. 2023, section 5).
    """
    losses, margins, likelier = scores.T
    return {
        "loss": float(losses.mean()),
        "preference_accuracy": _share_positive(margins),
        "reward_margin": float(margins.mean()),
        "likelihood_accuracy": _share_positive(likelier),
    }


def _share_positive(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.mean(values > 0) + np.mean(values == 0) / 2)


def token_loss(losses: Sequence[float], counts: Sequence[int]) -> float:
    """Loss per target token (nats): the sum of losses over the sum of tokens."""
    return float(np.sum(losses) / np.sum(counts))


def is_better(value: float, than: float, metric: str) -> bool:
    """Whether ``value`` beats ``than`` in this metric."""
    return value < than if metric in LOWER_IS_BETTER else value > than


def client_mean(clients: Mapping[str, Mapping[str, float]]) -> Metrics:
    """The plain mean over clients, metric by metric."""
    return {name: float(np.mean([values[name] for values in clients.values()])) for name in _names(clients)}


def worst_client(clients: Mapping[str, Mapping[str, float]]) -> Metrics:
    """The worst value over clients, metric by metric."""
    return {
        name: (max if name in LOWER_IS_BETTER else min)(values[name] for values in clients.values())
        for name in _names(clients)
    }


def _names(clients: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(next(iter(clients.values()))) if clients else []
