"""The attack ``sums``: which texts are in the sums from which a head is fitted?"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..data.examples import Example
from ..methods import Task
from ..methods.tuning.head_messages import unpacked
from ..methods.tuning.messages import FitHeadTask, HeadGradientUpdate, SumGradientsTask, SumVectorsTask
from .attack import CannotAttack, Deadline, OutOfTime, Received, RoundKind, RoundView, Summed, Target
from .released_head import head_findings
from .results import Finding, View
from .statistics import share_interval, wilson

MOST_CANDIDATES = 6000
"""Texts among which the right ones are looked for; pairs of them take the square of it in memory."""

RESOLVED = 1e-5
"""Of the largest singular value: what float32 numbers still resolve."""

PIECE = 64
"""Texts that go through the model between two looks at the clock."""

WORDS = {"scatter": "second moments", "gradients": "gradients of the head"}
"""What is checked for texts in its span, in words."""

EQUAL = 1e-5
"""Of a vector's length: two texts that are no further apart are one to the model."""


class Sums:
    """Names the texts in a client's head sums, among all training texts of all clients.

    A label's sum over one text is its vector, over two texts the sum of two: the nearest candidate, and the
    nearest of all pairs of candidates. Of more texts, the client's triangular factor R (R^T R is the sum of
    x x^T) and the gradients of the head have rows that are combinations of the client's vectors alone: the
    candidates that lie in the span of the rows are its texts, as long as it has fewer than the vectors have
    numbers (factor) or than it sends rows (gradients). Head sums are those of
    :class:`~fedcustom.methods.tuning.head_fit.HeadFit`; whichever labels' sums it withholds are not attacked.
    Where clients' messages are not looked at, or their sums are noised, the released head is attacked
    (:mod:`.released_head`). Under secure sums both are: the sums over all clients, as if one client had sent
    them, and the released head.

    Nearest-neighbour inversion of embeddings; the span check is that of DAGER (Petrov et al. 2024, arXiv
    2405.15586) on the head's inputs.
    """

    name = "sums"
    views: tuple[View, ...] = ("client's update", "state difference", "sum of clients")
    kinds: tuple[RoundKind, ...] = ("fitting the head",)
    source = "nearest candidate; span check after DAGER (Petrov et al. 2024, arXiv 2405.15586)"

    def inapplicable(self, target: Target) -> str | None:
        """Where no head is fitted to sums."""
        try:
            fits = target.knowledge.parts.head_rounds
        except CannotAttack as error:
            return str(error)
        return None if fits else "no round fits the head to clients' sums (training.fit_head = false)"

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding]:
        """The share of texts and of sums that are named, for each kind of figures that clients sent."""
        sent = {name: _Sent.of(name, messages) for name, messages in seen.by_client.items()}
        clients = [each for each in sent.values() if each is not None]
        total = _Sent.of_sum(seen.sums)
        noised = any(getattr(message.update, "deviation", None) is not None for message in seen.received)
        if not clients and not noised and (seen.received or not seen.answered):
            raise CannotAttack("no client of the round sent sums")
        shown = [m.task for m in seen.received] + [each.task for each in seen.sums]
        task = next((each for each in shown if isinstance(each, FitHeadTask)), None) or seen.task(target)
        asked = [each.client for each in clients] or list(seen.answered)
        held = [] if clients else target.data.development
        pool = _Pool.of(target, asked, task, deadline, held)
        if not clients:
            inside = [bool(owner) and owner in set(asked) for owner in pool.owners]
            released = head_findings(target, seen, pool.examples, inside, pool.vectors)
            return [*(self._all(target, seen, [total], pool, deadline) if total else []), *released]
        return self._all(target, seen, clients, pool, deadline)

    def _all(
        self, target: Target, seen: RoundView, clients: Sequence[_Sent], pool: _Pool, deadline: Deadline
    ) -> list[Finding]:
        """What clients' figures tell, or the sum over all clients, as if one had sent it."""
        found = [*self._single(target, seen, clients, pool, deadline)]
        found += self._span(seen, clients, pool, "scatter", target.seed, deadline)
        found += self._span(seen, clients, pool, "gradients", target.seed, deadline)
        if clients[0].members != (clients[0].client,):
            return [replace(each, view="sum of clients") for each in found]
        return found

    def _single(
        self, target: Target, seen: RoundView, clients: Sequence[_Sent], pool: _Pool, deadline: Deadline
    ) -> list[Finding]:
        """The sums of one text and of two."""
        every = sum(len(each.totals) for each in clients)
        small = [(each, label, n) for each in clients for label, n in each.sizes.items() if n <= 2]
        exposed = sum(n == 1 for _, _, n in small), sum(n == 2 for _, _, n in small)
        of = f"of {every} label sums {exposed[0]} are one text and {exposed[1]} are two"
        share = len(small) / every if every else 0.0
        found = [
            Finding(
                self.name, self.views[0], seen.number, "label sums of one or two texts", share, None,
                every, 0, of if every else "no client sent the sum of a label",
            )
        ]  # fmt: skip
        for size, words in ((1, "sums of one text named"), (2, "sums of two texts named")):
            tried = hits = 0
            for each, label, number in small:
                if number != size:
                    continue
                deadline.check()
                guess = pool.nearest(each.totals[label]) if size == 1 else pool.pair(each.totals[label])
                tried += 1
                own = [e for name in each.members for e in target.data.clients[name].train]
                hits += pool.holds(guess, own, label)
            if not tried:
                continue
            many = len(pool.vectors) if size == 1 else len(pool.vectors) * (len(pool.vectors) + 1) // 2
            low, high = wilson(hits, tried)
            what = "text" if size == 1 else "pair of texts"
            said = f"{hits} of {tried} times the nearest {what} is the right one"
            found.append(
                Finding(
                    self.name, self.views[0], seen.number, words, hits / tried, 1 / many, tried, many, said,
                    low, high,
                )
            )  # fmt: skip
        return found

    def _span(
        self,
        seen: RoundView,
        clients: Sequence[_Sent],
        pool: _Pool,
        part: str,
        seed: int,
        deadline: Deadline,
    ) -> list[Finding]:
        """The texts that lie in the span of what a client sent."""
        shares, texts, chances, sent = [], 0, [], 0
        for each in clients:
            deadline.check()
            rows = each.scatter if part == "scatter" else each.gradients
            rows = rows[rows.abs().amax(dim=1) > 0] if len(rows) else rows  # zeros are what is withheld
            sent += bool(len(rows))
            own = pool.places(each.members)
            if part == "scatter":
                own = [place for place in own if pool.examples[place].label in each.totals]
            if not len(rows) or not own:
                continue
            ranked = pool.residuals(rows, bias=part == "gradients").argsort()
            number = len(set(pool.group[own].tolist()))
            first = _distinct(pool.group[ranked].tolist(), number)
            shares.append(len(first & set(pool.group[own].tolist())) / number)
            chances.append(number / len(pool.vectors))
            texts += number
        alone = clients[0].members == (clients[0].client,)
        who = "clients that send" if alone else "sums over clients of"
        found = [
            Finding(
                self.name, self.views[0], seen.number, f"{who} {WORDS[part]}",
                sent / len(clients), None, len(clients), 0,
                f"{sent} of {len(clients)} {who} {WORDS[part]}; of the others it is withheld",
            )
        ]  # fmt: skip
        if not shares:
            return found
        values = np.array(shares)
        low, high = share_interval(values, seed)
        whole = int((values == 1).sum())
        return [
            *found,
            Finding(
                self.name, self.views[0], seen.number, f"texts named by the span of the {part}",
                float(values.mean()), float(np.mean(chances)), texts, len(pool.vectors),
                f"of {whole} of {len(values)} {'clients' if alone else 'sums'} every text is named by the "
                f"{part} that is sent",
                low, high,
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class _Sent:
    """What a client sent: the sum of each label that it did not withhold, and of how many texts it is;
    ``scatter``, rows in the span of its vectors, (rows, width); and ``gradients``, the same with a last
    column for the biases. ``members`` are the clients whose texts are in it: more than one of a sum.
    """

    client: str
    members: tuple[str, ...]
    totals: Mapping[int, Tensor]
    sizes: Mapping[int, int]
    scatter: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, client: str, messages: Sequence[Received]) -> _Sent | None:
        """From a client's messages of a round; None where it sent no sums."""
        first = next((m for m in messages if isinstance(m.task, FitHeadTask)), None)
        if first is None or "counted" not in first.update.tensors:
            return None
        tensors = first.update.tensors
        totals, counted = tensors["totals"].double(), tensors["counted"]
        labels = torch.nonzero(counted > 0).flatten().tolist()
        gradients = [
            m.update.tensors["gradient"] for m in messages if isinstance(m.update, HeadGradientUpdate)
        ]
        width = totals.shape[1]
        factor = tensors.get("factor", torch.zeros(0))
        return cls(
            client,
            (client,),
            dict(zip(labels, totals, strict=True)),
            {label: int(counted[label]) for label in labels},
            unpacked(factor.double(), width),
            torch.cat(gradients).double() if gradients else torch.zeros(0, width + 1, dtype=torch.float64),
        )

    @classmethod
    def of_sum(cls, sums: Sequence[Summed]) -> _Sent | None:
        """From the sums over clients that the server was shown of a round; None where there are none of
        vectors.
        """
        first = next((each for each in sums if isinstance(each.task, SumVectorsTask)), None)
        if first is None:
            return None
        tensors = first.update.tensors
        labels = torch.nonzero(tensors["counted"] > 0).flatten().tolist()
        totals = tensors["totals"].double()
        upper = unpacked(tensors["scatter"].double(), totals.shape[1])
        values, basis = torch.linalg.eigh(upper + upper.T - torch.diag(upper.diagonal()))
        gradients = [
            each.update.tensors["gradient"] for each in sums if isinstance(each.task, SumGradientsTask)
        ]
        none = torch.zeros(0, totals.shape[1] + 1, dtype=torch.float64)
        return cls(
            SUM,
            first.clients,
            dict(zip(labels, totals, strict=True)),
            {label: int(tensors["counted"][label]) for label in labels},
            values.clamp(min=0).sqrt()[:, None] * basis.T,
            torch.cat(gradients).double() if gradients else none,
        )


SUM = "(sum)"
"""The name of a sum over clients."""


@dataclass(frozen=True)
class _Pool:
    """The candidates: texts, their vectors (candidates, width), whose they are, and ``group``, the number of
    the first candidate that the model cannot tell from each.
    """

    examples: list[Example]
    owners: list[str]
    vectors: Tensor
    products: Tensor
    group: Tensor

    @classmethod
    def of(
        cls,
        target: Target,
        clients: Sequence[str],
        task: Task,
        deadline: Deadline,
        held: Sequence[Example] = (),
    ) -> _Pool:
        """All training texts of the attacked clients, and others up to the most that are taken: of ``held``,
        which nobody owns, and of other clients. Where there is no time for them, fewer others.

        Raises:
            OutOfTime: there is no time for the clients' own.
        """
        own = [(name, e) for name in clients for e in target.data.clients[name].train]
        asked = set(clients)
        rest = [("", e) for e in held] + [
            (name, e) for name, client in target.data.clients.items() if name not in asked
            for e in client.train
        ]  # fmt: skip
        order = np.random.default_rng([target.seed, 33]).permutation(len(rest))
        chosen = own + [rest[i] for i in order[: max(0, MOST_CANDIDATES - len(own))]]
        if len(own) > MOST_CANDIDATES:
            raise CannotAttack(
                f"the clients have {len(own)} texts, above the {MOST_CANDIDATES} that are tried"
            )
        target.knowledge.enter(task)
        pieces, done, began = list[Tensor](), 0, time.monotonic()
        while done < len(chosen):
            deadline.check()
            pieces.append(target.knowledge.vectors([e for _, e in chosen[done : done + PIECE]]))
            done += PIECE
            if len(pieces) == 1:  # a quarter of the time is for this, the rest for the search
                each = 4 * (time.monotonic() - began) / PIECE
                if (most := done + deadline.fitting(each, len(chosen))) < len(own):
                    raise OutOfTime
                chosen = chosen[:most]
        vectors, examples = torch.cat(pieces), [example for _, example in chosen]
        return cls(
            examples, [name for name, _ in chosen], vectors, vectors @ vectors.T, same_vectors(vectors)
        )

    def places(self, clients: Collection[str]) -> list[int]:
        """Which candidates are these clients' own."""
        return [place for place, owner in enumerate(self.owners) if owner in clients]

    def nearest(self, total: Tensor) -> list[int]:
        """The candidate next to a vector."""
        return [int((self.vectors.double() - total).square().sum(dim=1).argmin())]

    def pair(self, total: Tensor) -> list[int]:
        """The two candidates whose sum is next to a vector: |s - x - y|^2 = |s|^2 + a_x + a_y + 2 x y with
        a_x = |x|^2 - 2 s x.
        """
        squares = self.products.diagonal()
        alone = squares - 2 * (self.vectors @ total.float())
        least, places = ((alone / 2)[None] + self.products).min(dim=1)
        first = int((alone / 2 + least).argmin())
        return [first, int(places[first])]

    def holds(self, guess: Sequence[int], examples: Sequence[Example], label: int) -> bool:
        """Whether the guess is what a client has of a label, up to texts that are one to the model."""
        where = {id(e): place for place, e in enumerate(self.examples)}
        right = [where[id(e)] for e in examples if e.label == label]
        return sorted(self.group[list(guess)].tolist()) == sorted(self.group[right].tolist())

    def residuals(self, rows: Tensor, *, bias: bool) -> Tensor:
        """How far each candidate is from the span of rows, relative to its length, (candidates,)."""
        vectors = self.vectors.double()
        if bias:
            vectors = torch.cat([vectors, torch.ones(len(vectors), 1, dtype=torch.float64)], dim=1)
        _, values, basis = torch.linalg.svd(rows, full_matrices=False)
        basis = basis[values > RESOLVED * values.max().clamp(min=1e-30)]
        lengths = vectors.norm(dim=1).clamp(min=1e-30)
        distances = (vectors - vectors @ basis.T @ basis).norm(dim=1)
        relative: Tensor = distances / lengths
        return relative


def same_vectors(vectors: Tensor) -> Tensor:
    """For each vector the place of the first one that it equals, to rounding, (vectors,)."""
    group = torch.arange(len(vectors))
    lengths = vectors.norm(dim=1)
    for start in range(0, len(vectors), 1000):
        part = vectors[start : start + 1000]
        near = torch.cdist(part, vectors) <= 1e-3 * lengths[start : start + 1000, None]
        for row, column in near.nonzero().tolist():
            gap = (part[row].double() - vectors[column].double()).norm()
            if column < start + row and float(gap) <= EQUAL * float(lengths[start + row]):
                group[start + row] = min(int(group[start + row]), column)
    return group


def _distinct(groups: Sequence[int], number: int) -> set[int]:
    """The first so many different ones."""
    found: dict[int, None] = {}
    for group in groups:
        if len(found) == number:
            break
        found[group] = None
    return set(found)
