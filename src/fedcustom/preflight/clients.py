"""Sizes of clients and their labels, in lists of bounded length."""

from __future__ import annotations

from collections import Counter
from statistics import median

from ..data.examples import ClientData, FederatedData
from .report import ClientSize, ClientSizes

MOST_CLIENTS, MOST_LABELS = 50, 50
"""Clients, and labels of one of them, that are listed at most."""


def client_sizes(data: FederatedData) -> ClientSizes:
    """Who holds how many examples, of which labels."""
    names, labels = list(data.clients), data.task.labels
    sizes = [len(client.train) for client in data.clients.values()]
    everybody = Counter(
        labels[example.label] for client in data.clients.values() for example in client.train if labels
    )
    listed = tuple(_size(name, data.clients[name], labels) for name in names[:MOST_CLIENTS])
    return ClientSizes(
        count=len(names),
        smallest=min(sizes),
        median=float(median(sizes)),
        largest=max(sizes),
        listed=listed,
        more=len(names) - len(listed),
        labels=dict(everybody.most_common(MOST_LABELS)),
        more_labels=max(0, len(everybody) - MOST_LABELS),
    )


def _size(name: str, client: ClientData, labels: tuple[str, ...]) -> ClientSize:
    counts = Counter(labels[example.label] for example in client.train if labels)
    parts = (len(client.train), len(client.development), len(client.test))
    return ClientSize(name, *parts, dict(counts.most_common(MOST_LABELS)))
