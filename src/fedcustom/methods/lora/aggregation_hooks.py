"""What travels and how it is merged in each federated variant of LoRA; the rules are ``aggregation/lora.py``.

=========  ====================  ===================================================================
variant    sent up               the server
=========  ====================  ===================================================================
fedit      A, B                  means of A and of B apart: not the mean of B A (Zhang et al. 2023)
ffa        B                     mean of B; A stays at its shared start: exact (Sun et al. 2024)
rolora     B and A by turns      mean of the one, the other rests: exact (Chen et al. 2024)
fedsa      A                     mean of A; B stays with the client (Guo et al. 2024)
flora      A, B, mixed ranks     adds the stacked product to the base: exact (Wang et al. 2024)
fedex      A, B                  means, and adds what they miss to the base: exact (Singhal et al. 2024)
flexlora   A, B, mixed ranks     best approximation of the ideal at a rank (Bai et al. 2024)
hetlora    A, B, mixed ranks     zero-padded, weighted by norm, truncated (Cho et al. 2024)
fedsb      R (rank x rank)       mean of R between fixed B and A: exact (Singhal et al. 2025)
fedsvd     B                     mean of B; factors B A anew, A = V^T: exact (Lee et al. 2025)
fedask     sketches of B A       best approximation of the ideal, in two exchanges (arXiv 2507.09990)
=========  ====================  ===================================================================

``flora`` and ``fedex`` change the base, so what goes down holds a dense change of every adapted matrix: a
client need not have been there before.

In ``fedsvd`` only what is sent down is factored anew. The state is B in the rows of A at its start, which
span those of every later A, since no client trains A. A client's change is turned into these rows when it
arrives. So the sum of changes, noise that is correlated over rounds, moments of a server optimiser and late
changes are all of one coordinate system, and of B A itself, as the rows are orthonormal.

A round of ``fedask`` has two exchanges, both of which add up (:mod:`.sketch_exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...aggregation import robust
from ...aggregation.lora import (
    LoraUpdate,
    aggregation_error,
    lora_inner_products,
    padded_lora,
    residual_lora,
    stacked_lora,
    truncated_lora,
)
from ...aggregation.lora_factors import LoraFactors, in_rows_of, refactored, truncate_rank, with_scale
from ...aggregation.settings import AggregationSettings
from ...core.seeds import name_seed
from ...core.tensors import Tensors, part, without
from ..messages import Update
from ..protocol import Aggregate, Memory, State, Values
from ..tuning.aggregation_hooks import AggregationHooks, ClientDelta, RoundAggregator
from ..tuning.further_exchange import FurtherExchange
from ..tuning.messages import TrainTask, TrainUpdate
from .matrix import PRIVATE, Matrix
from .settings import CHANGES_BASE, OWN_RULE, LoraSettings
from .sketch_exchange import SKETCH, SketchExchange


class LoraAggregation(AggregationHooks):
    """The rules of the recipe's variant, for all adapted matrices."""

    def __init__(self, settings: LoraSettings, matrices: Sequence[Matrix], seed: int) -> None:
        self.settings, self.matrices, self.seed = settings, matrices, seed
        variant = settings.variant
        self.own_rule = f"lora variant {variant}" if variant in OWN_RULE else ""
        self.sketches = SketchExchange(settings, matrices, seed) if variant == "fedask" else None
        self.linear = self.sketches is not None
        self.packs = "sketches of products B A" if self.sketches is not None else ""
        self.personal = ("lora_B",) if variant == "fedsa" else ()
        if settings.private_rank:
            self.personal = (PRIVATE,)
        self.turns = f"lora variant {variant}" if settings.turns_tensors else ""
        self._refactored: tuple[list[Tensor], Tensors] = ([], {})

    def rank_of(self, client: str) -> int:
        """The client's rank: a draw by its name."""
        ranks = self.settings.client_ranks
        if not ranks:
            return self.settings.rank
        shares = np.array(self.settings.client_rank_shares or [1.0] * len(ranks))
        draw = np.random.default_rng([self.seed, 12, name_seed(client)]).random()
        position = int(np.searchsorted(np.cumsum(shares / shares.sum()), draw, side="right"))
        return ranks[min(position, len(ranks) - 1)]

    def initialise(self, tensors: Tensors) -> Tensors:
        """In ``flora`` the state is the changed base; A and B begin anew in each round. In ``fedsvd`` it has
        no A, which stays what it was.
        """
        absent = {"flora": (".lora_A.", ".lora_B."), "fedsvd": (".lora_A.",)}.get(self.settings.variant, ())
        return {n: t for n, t in tensors.items() if not any(part in n for part in absent)}

    def down(self, tensors: Tensors, client: str, round_number: int) -> Tensors:
        """The state, with A and B at the client's rank and scale."""
        rank, settings = self.rank_of(client), self.settings
        if settings.variant == "flora":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_number)
            own = {}
            for matrix in self.matrices:
                bound = matrix.a.shape[1] ** -0.5  # as nn.Linear and PEFT initialise A
                own[matrix.a_name] = torch.empty_like(matrix.a).uniform_(-bound, bound, generator=generator)[
                    :rank
                ]
                own[matrix.b_name] = torch.zeros_like(matrix.b[:, :rank])
            return {**tensors, **own}
        if settings.variant == "fedsvd":
            return {**tensors, **self._factored_anew(tensors)}
        if rank == settings.rank:
            return tensors
        own = {}
        for matrix in self.matrices:
            whole = LoraFactors(tensors[matrix.a_name], tensors[matrix.b_name], settings.scale(settings.rank))
            part = with_scale(truncate_rank(whole, rank), settings.scale(rank))
            own |= {matrix.a_name: part.a.contiguous(), matrix.b_name: part.b.contiguous()}
        return {**tensors, **own}

    def trains(self, name: str, round_number: int) -> bool:
        """In ``rolora``, B in odd rounds and A in even ones; in ``fedsvd`` B alone."""
        if self.settings.variant == "fedsvd":
            return ".lora_A." not in name
        if self.settings.variant != "rolora":
            return True
        return (".lora_A." if round_number % 2 else ".lora_B.") not in name

    def pack(self, update: TrainUpdate, task: TrainTask, memory: Memory) -> TrainUpdate:
        """In ``fedask``, a sketch of each product in place of its factors."""
        if self.sketches is None:
            return update
        return self.sketches.pack(update, task.tensors, task.round_number, memory)

    def forms(self, wanted: Tensors, task: TrainTask) -> Tensors:
        """Those of what :meth:`pack` gives."""
        return wanted if self.sketches is None else self.sketches.sketch_forms(wanted)

    def to_state(self, change: Tensors, sent: Tensors) -> Tensors:
        """In ``fedsvd``, the change of B in the rows of A at its start."""
        if not self.turns:
            return change
        own = {
            m.b_name: in_rows_of(change[m.b_name], sent[m.a_name], m.a)
            for m in self.matrices
            if m.b_name in change
        }
        return {**change, **own}

    def round(self, state: State) -> RoundAggregator:
        """Begin to merge a round."""
        if self.sketches is not None:
            return SketchRoundAggregator(self.sketches)
        return LoraRoundAggregator(self, state.tensors)

    def further(self, settings: AggregationSettings) -> FurtherExchange | None:
        """In ``fedask``, the exchange in which products are projected."""
        if self.sketches is None:
            return None

        def weight(update: Update) -> float:
            return update.weight if settings.weighting == "examples" else 1.0

        return SketchExchange(self.settings, self.matrices, self.seed, weight)

    def _factored_anew(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """A and B that are sent in place of a state's B; computed once for a whole cohort."""
        given = [tensors[matrix.b_name] for matrix in self.matrices]
        known, found = self._refactored
        if len(known) == len(given) and all(a is b for a, b in zip(known, given, strict=True)):
            return found
        found = {}
        for matrix, b in zip(self.matrices, given, strict=True):
            best = refactored(LoraFactors(matrix.a.to(b.dtype), b))
            found |= {matrix.a_name: best.a.contiguous(), matrix.b_name: best.b.contiguous()}
        self._refactored = (given, found)
        return found

    def factors(self, matrix: Matrix, tensors: Mapping[str, Tensor]) -> LoraFactors:
        """A matrix's factors in a state; those that the state lacks are as they were initialised."""
        b = tensors.get(matrix.b_name, matrix.b)
        if matrix.r_name in tensors:
            b = b @ tensors[matrix.r_name]
        a = tensors.get(matrix.a_name, matrix.a)
        return LoraFactors(a, b, self.settings.scale(a.shape[0]))


class LoraRoundAggregator(RoundAggregator):
    """One round: what the clients' factors amount to, and how far the merged change is from that."""

    def __init__(self, hooks: LoraAggregation, before: Tensors) -> None:
        self.hooks, self.before = hooks, before
        self.ideal: Tensors = {}
        self.weight = 0.0
        self.updates: dict[str, list[LoraUpdate]] = {}
        self.personal = False

    def take(self, arrival: ClientDelta) -> Tensors:
        """Add the client's product to the ideal; the rest is for the recipe's rule."""
        hooks, weight = self.hooks, arrival.weight
        factors_of = {n for m in hooks.matrices for n in (m.a_name, m.b_name, m.r_name)}
        self.personal = not factors_of & self.before.keys() <= arrival.sent.keys()
        if self.personal or hooks.settings.dora:  # the product is not known here, or not all that counts
            return arrival.change
        # A late change is added to the newest state, not to that which its client was sent.
        start = arrival.sent if hooks.own_rule else self.before
        after = {n: t + arrival.discount * arrival.change.get(n, 0) for n, t in start.items()}
        for matrix in hooks.matrices:
            factors = hooks.factors(matrix, after)
            product = factors.change()
            if weight:
                if matrix.name not in self.ideal:
                    self.ideal[matrix.name] = torch.zeros_like(product)
                self.ideal[matrix.name].add_(product, alpha=weight)
            if hooks.own_rule:
                update = LoraUpdate(arrival.client, factors, weight)
                self.updates.setdefault(matrix.name, []).append(update)
        self.weight += weight
        if not hooks.own_rule:
            return arrival.change
        return {name: tensor for name, tensor in arrival.change.items() if name not in factors_of}

    def merged(self, tensors: Tensors) -> tuple[Tensors, Values]:
        """The merged factors and base changes, and the relative distance of their sum from the ideal."""
        if not self.ideal:
            return {}, {}
        hooks = self.hooks
        own: Tensors = {}
        for matrix in hooks.matrices:
            if hooks.own_rule:
                own |= self._merge(matrix, self.updates.pop(matrix.name))
        after = {**tensors, **own}
        pairs = []
        for matrix in hooks.matrices:
            reached = hooks.factors(matrix, after).change()
            if hooks.settings.variant in CHANGES_BASE:
                if hooks.settings.variant == "flora":
                    reached = torch.zeros_like(reached)
                reached = reached + after[matrix.base_name] - self.before[matrix.base_name]
            pairs.append((reached, self.ideal[matrix.name] / self.weight))
        error = aggregation_error(pairs)
        return own, {"aggregation_error": error} if math.isfinite(error) else {}

    def inner_products(self, changes: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Distances are those of the products B A, not of the factors; of other tensors, their own."""
        hooks = self.hooks
        mine = {n for m in hooks.matrices for n in (m.a_name, m.b_name, m.r_name)}
        if self.personal:
            return robust.inner_products(changes)
        rest = [{n: t for n, t in change.items() if n not in mine} for change in changes]
        gram = robust.inner_products(rest)
        for matrix in hooks.matrices:
            updates = []
            for number, change in enumerate(changes):
                trained = {n: self.before[n] + change[n] for n in mine & change.keys()}
                after = {**self.before, **trained}
                updates.append(LoraUpdate(str(number), hooks.factors(matrix, after)))
            gram += lora_inner_products(updates, hooks.factors(matrix, self.before))
        return gram

    def _merge(self, matrix: Matrix, updates: list[LoraUpdate]) -> Tensors:
        """One matrix by the variant's own rule."""
        settings = self.hooks.settings
        scale = settings.scale(settings.rank)
        if settings.variant == "flora":
            change = stacked_lora(updates, scale).change()
            return {matrix.base_name: self.before[matrix.base_name] + change}
        if settings.variant == "fedex":
            mean, residual = residual_lora(updates)
            base = self.before[matrix.base_name] + residual
            return {matrix.a_name: mean.a, matrix.b_name: mean.b, matrix.base_name: base}
        if settings.variant == "flexlora":
            best = truncated_lora(updates, settings.rank, scale)
            # Directions that the clients left empty keep rows of A, or they could never be trained again.
            empty = best.b.norm(dim=0) <= 1e-6 * best.b.norm()
            return {matrix.a_name: torch.where(empty[:, None], matrix.a, best.a), matrix.b_name: best.b}
        padded = padded_lora(updates, settings.rank, scale)
        return {matrix.a_name: padded.a, matrix.b_name: padded.b}


class SketchRoundAggregator(RoundAggregator):
    """The first exchange of a round of ``fedask``: the mean of the clients' sketches."""

    def __init__(self, sketches: SketchExchange) -> None:
        self.sketches = sketches
        self.moved: Tensors = {}
        self.weight = 0.0
        self.round_number = 0

    def take(self, delta: ClientDelta) -> Tensors:
        """Add the client's sketches; the rest is for the recipe's rule."""
        for name, tensor in part(delta.change, SKETCH).items():
            more = tensor.double() * delta.weight
            self.moved[name] = self.moved[name].add_(more) if name in self.moved else more
        self.weight, self.round_number = self.weight + delta.weight, delta.round_number
        return without(delta.change, SKETCH)

    def ended(self, state: State, report: Values) -> Aggregate:
        """The state that waits for the projections."""
        mean = {name: tensor / self.weight for name, tensor in self.moved.items()}
        return self.sketches.unfinished(state, mean, self.round_number)
