"""Merging of the clients' result lists into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .store import Found

RANK_CONSTANT = 60
"""k of reciprocal rank fusion (Cormack et al. 2009)."""


@dataclass(frozen=True)
class Hit:
    """A document that was found: whose it is, and its score."""

    document: str
    client: str
    score: float


def by_score(lists: Mapping[str, Found], top: int) -> list[Hit]:
    """The ``top`` documents of all clients by falling score, equal ones by name.

    A document that several clients hold counts once, as that of the first of them by name. As scores do not
    depend on the client, this is the list that one store of all documents gives.
    """
    best: dict[str, Hit] = {}
    for client in sorted(lists):
        for document, score in zip(lists[client].documents, lists[client].scores, strict=True):
            if document not in best or score > best[document].score:
                best[document] = Hit(document, client, score)
    return _first(best, top)


def by_rank(lists: Sequence[Mapping[str, Found]], top: int) -> list[Hit]:
    """Reciprocal rank fusion: ``score(d) = sum 1 / (60 + rank(d))`` over all lists that hold d (Cormack et
    al. 2009). Each mapping is one way of searching, with a list of each client.
    """
    total: dict[str, Hit] = {}
    for way in lists:
        for client in sorted(way):
            for rank, document in enumerate(way[client].documents, start=1):
                old = total.get(document)
                score = 1 / (RANK_CONSTANT + rank) + (old.score if old else 0.0)
                total[document] = Hit(document, old.client if old else client, score)
    return _first(total, top)


def as_list(hits: Sequence[Hit]) -> Found:
    """Merged hits as one list, to be merged with others."""
    return Found([hit.document for hit in hits], [hit.score for hit in hits])


def _first(hits: Mapping[str, Hit], top: int) -> list[Hit]:
    return sorted(hits.values(), key=lambda hit: (-hit.score, hit.document))[:top]
