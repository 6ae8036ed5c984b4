"""Retrieval measures, and the worth of passages to a generator."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.examples import Example
from ...evaluation.metrics import retrieval_metrics
from .chunking import digest
from .generation import Generator
from .search import Searched, Searcher


def search_figures(searches: dict[str, Searched], wanted: Sequence[str]) -> dict[str, dict[str, float]]:
    """Recall, rank, clients asked and bytes a query of searches by name, for the documents wanted."""
    return {
        name: {
            **retrieval_metrics(each.ranks(wanted), each.asked.double().mean(dim=1).tolist()),
            "bytes_up_per_query": each.bytes_up / len(wanted),
            "bytes_down_per_query": each.bytes_down / len(wanted),
        }
        for name, each in searches.items()
    }


def answer_losses(
    generator: Generator, searcher: Searcher, examples: Sequence[Example], searched: Searched
) -> dict[str, float]:
    """The generator's loss per token, in nats, of reference answers, with and without passages. ``searched``
    begins with the examples' questions.
    """
    given, others, size = [], [], searcher.settings.passages_given
    for example, hits, vector in zip(examples, searched.hits, searched.vectors, strict=False):
        shown = searcher.passages(hits, vector)
        own = digest(example.target)
        order = [hit.document for hit in hits if hit.document in shown]
        given.append([shown[name] for name in order][:size])
        others.append([shown[name] for name in order if name != own][:size])
    answers = [example.target for example in examples]
    nothing: list[list[str]] = [[] for _ in examples]
    return {
        "questions": float(len(examples)),
        "without passages": generator.loss(examples, nothing, answers),
        "with passages": generator.loss(examples, given, answers),
        "with passages of other documents": generator.loss(examples, others, answers),
    }
