"""The attack ``tokens``: which rows of the embedding table changed? They are the client's vocabulary."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import numpy as np
import torch
from torch import Tensor

from .attack import CannotAttack, Deadline, RoundKind, RoundView, Target
from .results import Finding, View
from .statistics import share_interval, wilson

MOVED = 1e-6
"""Of the largest row's change: below that, a row has moved by nothing but a common shrinking or rounding."""


class Tokens:
    """Reads a client's set of tokens from the change of the embedding table: the gradient has rows for the
    tokens of the texts alone, so that all other rows stay, or shrink by one common factor (weight decay).

    Of a sum of clients' changes, which is all that a server has under secure sums, it reads the tokens of all
    of them together.

    The first step of DAGER (Petrov et al. 2024, arXiv 2405.15586); its span check is not made here.
    """

    name = "tokens"
    views: tuple[View, ...] = ("client's update", "sum of clients")
    kinds: tuple[RoundKind, ...] = ("training",)
    source = "changed embedding rows (DAGER, Petrov et al. 2024, arXiv 2405.15586, without its span check)"

    def inapplicable(self, target: Target) -> str | None:
        """Where the table of embeddings is not trained, or is the output layer too."""
        try:
            name = target.knowledge.embedding()
        except CannotAttack as error:
            return str(error)
        if name is None:
            return "the table of input embeddings is not trained"
        if target.knowledge.ties_embeddings():
            return "the table of embeddings is the output layer too, so that every row changes"
        return None

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding]:
        """How many clients' sets of tokens are read exactly, and how near the others come."""
        name = target.knowledge.embedding()
        exact, overlaps, guesses, size = 0, [], [], 0
        usual, total = self._usual(target), seen.summed
        view: View = "sum of clients" if total else "client's update"
        sent = [((m.client,), m.task, m.update) for m in seen.received]
        for clients, task, update in [(total.clients, total.task, total.update)] if total else sent:
            deadline.check()
            change = target.knowledge.change(task, update).get(name or "")
            if change is None:
                continue
            size = len(change)
            found = changed_rows(change, task.tensors[name or ""])
            train = [example for client in clients for example in target.data.clients[client].train]
            right = frozenset[int]().union(*map(target.knowledge.tokens, train))
            exact += found == right
            overlaps.append(_overlap(found, right))
            guesses.append(_overlap(frozenset(usual[: len(right)]), right))
        if not overlaps:
            raise CannotAttack("no client of the round sent a change of the embedding table")
        count, values = len(overlaps), np.array(overlaps)
        low, high = wilson(exact, count)
        least, most = share_interval(values, target.seed)
        more = (
            f" ({seen.unseen} clients left out: their updates are too large to keep)" if seen.unseen else ""
        )
        whose = f"the sum of {len(total.clients)} clients" if total else f"{exact} of {count} clients"
        said = "is not read" if total and not exact else "is read"
        return [
            Finding(
                self.name, view, seen.number, "exact set of tokens", exact / count, 0.0, count, size,
                f"of {whose} the set of tokens {said} exactly{more}", low, high,
            ),
            Finding(
                self.name, view, seen.number, "overlap of sets (Jaccard)", float(values.mean()),
                float(np.mean(guesses)), count, size,
                f"what is read and what the client{'s have' if total else ' has'}; chance: as many of the "
                "most frequent tokens", least, most,
            ),
        ]  # fmt: skip

    def _usual(self, target: Target) -> list[int]:
        """The tokens by how many of a thousand texts have them, the most frequent first."""
        order = np.random.default_rng([target.seed, 34]).permutation(len(target.texts))[:1000]
        counts: dict[int, int] = {}
        for place in order:
            for token in target.knowledge.tokens(target.texts[int(place)]):
                counts[token] = counts.get(token, 0) + 1
        return sorted(counts, key=lambda token: (-counts[token], token))


def changed_rows(change: Tensor, before: Tensor) -> frozenset[int]:
    """The rows of a table that moved otherwise than by one factor that they share.

    The factor is the median of those by which rows shrank; it is that of weight decay, or zero.

    Args:
        change: That of the table, (tokens, width).
        before: The table before, (tokens, width).
    """
    change, before = change.double(), before.double()
    squares = before.square().sum(dim=1)
    factors = (change * before).sum(dim=1) / squares.clamp(min=1e-30)
    rest = (change - factors.median() * before).norm(dim=1)
    largest = float(rest.max())
    if not largest:
        return frozenset()
    return frozenset(torch.nonzero(rest > MOVED * largest + 1e-7 * before.norm(dim=1)).flatten().tolist())


def _overlap(found: AbstractSet[int], right: AbstractSet[int]) -> float:
    return len(found & right) / max(1, len(found | right))
