"""Tokens and texts of a client from the span of its change of the first layers (DAGER)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .attack import CannotAttack, Deadline, OutOfTime, RoundView, Target
from .auxiliary import f1
from .changes import OneChange
from .layer_inputs import LayerInputs
from .leading import leading_directions, nearness
from .rebuild import Text, combined, grown, is_causal
from .results import Finding, View
from .span import Span
from .statistics import share_interval
from .tokens import changed_rows
from .usual import Pair, Usual, pairs_of

PIECE, NUMBERS = 256, 2**23
"""Tokens whose inputs are computed at a time, at every position, and numbers of these inputs, at most."""


@dataclass
class Read:
    """What the span check reads of one client's change.

    Attributes:
        seen: The change.
        span: That of the first layer, None where nothing moved.
        exact: Whether steps add gradients up, or multiply them as matrices, so that the span is the inputs'.
        known: The tokens whose embeddings changed, where these are trained and tell.
        pairs: Tokens and positions that are in the span.
        texts: What was rebuilt of them.
        directions: Where the span tells nothing and no tokens are known, the leading ones of the signs.
        near: How near each token of the vocabulary is to these, (tokens,).
    """

    seen: OneChange
    span: Span | None
    exact: bool
    known: frozenset[int] | None = None
    pairs: set[Pair] = field(default_factory=set)
    texts: set[Text] = field(default_factory=set)
    directions: Tensor | None = None
    near: list[Tensor] = field(default_factory=list)

    @property
    def visible(self) -> bool:
        """Whether the span says anything."""
        return self.exact and self.span is not None and self.span.visible


@dataclass(frozen=True)
class SpanCheck:
    """The span check of DAGER (Petrov et al. 2024, arXiv 2405.15586): the gradient of a matrix is a sum of
    products of errors and inputs, so that its rows are combinations of the inputs. Those of the first layer's
    attention are known for each token at each position; the ones that lie in the span of the rows are the
    client's. Texts are rebuilt of them by the same test of the second layer.

    It holds as long as steps add gradients up (SGD, with momentum too), and as there are more rows, and
    vectors have more numbers, than the client has different inputs. Adam divides gradients number by number
    and leaves no exact span; then tokens are ranked by the leading directions of the change's signs
    (:mod:`.leading`).

    Attributes:
        first: The first layer's inputs.
        second: The second layer's; None where its matrices are not trained.
        length: Positions that are tried.
        positions: Whether an input depends on its position.
        usual: What texts usually have.
    """

    target: Target
    first: LayerInputs
    second: LayerInputs | None
    length: int
    positions: bool
    usual: Usual

    @classmethod
    def of(cls, target: Target, seen: OneChange) -> SpanCheck | None:
        """That of a run, by the state that a client had; None where no attention of the first layer is
        trained.
        """
        knowledge = target.knowledge
        knowledge.enter(seen.task)
        parts = knowledge.parts
        first = LayerInputs.of(parts.trainable, 0)
        if first is None:
            return None
        data, base = parts.context.data, parts.base
        length = data.max_length + (
            0 if target.data.task.kind == "classification" else data.max_target_length
        )
        limit = getattr(base.model.config, "max_position_embeddings", None)
        length = min(length, limit - 2) if limit else length  # some number positions from 2
        one, other = first.of_tokens([knowledge.texts(target.texts[0])[0][0]], 2)[0]
        positions = not torch.equal(one, other)
        usual = Usual.of(target, positions=positions)
        return cls(target, first, LayerInputs.of(parts.trainable, 1), length, positions, usual)

    def read(self, changes: Sequence[OneChange], deadline: Deadline) -> list[Read]:
        """What the changes of clients say that all had the same state.

        Raises:
            OutOfTime: the vocabulary would take longer than is left.
        """
        exact = self.target.knowledge.parts.context.training.optimizer != "adamw"
        found = [Read(each, self._span(self.first, each), exact, self._known(each)) for each in changes]
        for each in found:
            if each.span is not None and not each.visible and each.known is None:
                train = self.target.data.clients[each.seen.client].train  # of how many rows, is told
                rows = self.first.rows(each.seen.change)
                each.directions = leading_directions(rows, self.usual.numbers(len(train))[0])
        looked = [each for each in found if each.visible or each.directions is not None]
        if looked:
            self._look(looked, deadline)
        for each in looked:
            if each.visible:
                each.texts = self._texts(each, deadline)
        return found

    def _span(self, layer: LayerInputs, seen: OneChange) -> Span | None:
        names = {n: t for n, t in seen.change.items() if n in layer.matrices and n in seen.task.tensors}
        return Span.of(layer.rows(names), layer.rows({n: seen.task.tensors[n] for n in names}))

    def _known(self, seen: OneChange) -> frozenset[int] | None:
        knowledge = self.target.knowledge
        table = None if knowledge.ties_embeddings() else knowledge.embedding()
        if table is None or table not in seen.change:
            return None
        return changed_rows(seen.change[table], seen.task.tensors[table])

    def _look(self, reads: Sequence[Read], deadline: Deadline) -> None:
        """Look at the inputs of the tokens that are known, or of the whole vocabulary, at every position."""
        known, length = [each.known for each in reads], self.length if self.positions else 1
        wanted = range(self.size) if None in known else sorted(set[int]().union(*(k for k in known if k)))
        width = self.first.of_tokens([0], 1).shape[-1]
        piece = min(PIECE, max(1, NUMBERS // (length * width)))
        began, pieces = time.monotonic(), -(-len(wanted) // piece)
        for start in range(0, len(wanted), piece):
            deadline.check()
            tokens = list(wanted[start : start + piece])
            inputs = self.first.of_tokens(tokens, length)
            for each in reads:
                if each.directions is not None:
                    each.near.append(nearness(inputs, each.directions))
                    continue
                assert each.span is not None
                inside = each.span.holds(inputs.flatten(0, 1)).reshape(len(tokens), length)
                each.pairs |= {
                    (tokens[row], position)
                    for row, position in inside.nonzero().tolist()
                    if each.known is None or tokens[row] in each.known
                }
            if start == 0 and deadline.fitting(time.monotonic() - began, pieces) < pieces:
                raise OutOfTime

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.target.knowledge.parts.base.model.get_input_embeddings().weight)

    def _texts(self, read: Read, deadline: Deadline) -> set[Text]:
        """The texts that the pairs make."""
        at = [set[int]() for _ in range(self.length)]
        for token, position in read.pairs:
            for place in [position] if self.positions else range(self.length):
                at[place].add(token)
        span = self._span(self.second, read.seen) if self.second else None
        holds = span.holds if span is not None and span.visible else None
        if self.second is not None and holds is not None and is_causal(self.second):
            return grown(self.second, holds, at, deadline)
        special = self.target.knowledge.parts.base.tokenizer.all_special_ids
        return combined(self.second, holds, at, special, deadline)

    def right(self, client: str) -> tuple[set[Pair], set[Text]]:
        """The pairs and texts that a client has. A generator's last token predicts nothing, and is not
        asked for.
        """
        data, writes = self.target.data, self.target.data.task.kind != "classification"
        texts = [t for e in data.clients[client].train for t in self.target.knowledge.texts(e)]
        texts = [text[:-1] if writes else text for text in texts]
        return set(pairs_of(texts, positions=self.positions)), {tuple(text) for text in texts}


def span_findings(
    target: Target, seen: RoundView, changes: Sequence[OneChange], deadline: Deadline
) -> list[Finding]:
    """How many clients' changes have a span, and what it says of their tokens and texts.

    Raises:
        CannotAttack: no attention of the first layer is trained.
        OutOfTime: the deadline has passed.
    """
    found: list[Finding] = []
    for view in dict.fromkeys(each.view for each in changes):
        own = [each for each in changes if each.view == view]
        check = SpanCheck.of(target, own[0])
        if check is None:
            raise CannotAttack("no matrix of the first layer's attention is trained, or there are two stacks")
        found += _findings(check, seen, view, check.read(own, deadline))
    return found


def _findings(check: SpanCheck, seen: RoundView, view: View, reads: Sequence[Read]) -> list[Finding]:
    count, open_ = len(reads), sum(each.visible for each in reads)
    still = sum(each.span is None for each in reads)
    divided = 0 if all(each.exact for each in reads) else count - still
    full = sum(each.exact and each.span is not None and each.span.full for each in reads)
    limited = count - open_ - still - divided - full
    reasons = [
        (divided, "Adam has divided the gradient number by number"),
        (full, "the change has every direction, as after noise, codes, Muon or too many tokens"),
        (limited, "there are as many directions as rows of the trained matrices, too few for the tokens"),
        (still, "the matrices did not move: LoRA's first factor while the second is zero, or where it rests"),
    ]
    said = "; ".join(f"of {number} {reason}" for number, reason in reasons if number)
    more = f" ({seen.unseen} clients left out: their updates are too large to keep)" if seen.unseen else ""
    found = [
        Finding(
            "inversion", view, seen.number, "clients whose change has a span", open_ / count, None, count, 0,
            f"{open_} of {count} clients' changes of the first layer tell of which tokens they are"
            f"{f'; {said}' if said else ''}{more}",
        )
    ]  # fmt: skip
    found += _by_directions(check, seen, view, reads)
    if not open_:
        return found
    usual = check.usual.pairs
    shares: dict[str, list[float]] = {"recall": [], "precision": [], "texts": []}
    guesses: dict[str, list[float]] = {"recall": [], "precision": [], "texts": [0.0]}
    texts = rebuilt = named = right_pairs = hits = said_pairs = 0
    for each in reads:
        right, whole = check.right(each.seen.client)
        both, guessed = len(each.pairs & right), len(set(usual[: len(each.pairs)]) & right)
        shares["recall"].append(both / len(right))
        guesses["recall"].append(guessed / len(right))
        if each.pairs:
            shares["precision"].append(both / len(each.pairs))
            guesses["precision"].append(guessed / len(each.pairs))
        shares["texts"].append(len(each.texts & whole) / len(whole))
        hits, right_pairs, said_pairs = hits + both, right_pairs + len(right), said_pairs + len(each.pairs)
        texts, rebuilt = texts + len(whole), rebuilt + len(each.texts & whole)
        named += len(each.texts)
    what = "tokens with their positions" if check.positions else "tokens"
    many = check.size * (check.length if check.positions else 1)
    meanings = {
        "recall": (
            f"{what}: recall",
            f"{hits} of {right_pairs} are found; chance: as many of the usual ones",
        ),
        "precision": (f"{what}: precision", f"{hits} of the {said_pairs} that are found are a client's"),
        "texts": (
            "texts rebuilt exactly",
            f"{rebuilt} of {texts} texts, from the pairs and the second layer; {named} are named in all",
        ),
    }
    for key, (measure, meaning) in meanings.items():
        if not shares[key]:
            continue
        share, guess = float(np.mean(shares[key])), float(np.mean(guesses[key]))
        low, high = share_interval(np.array(shares[key]), check.target.seed)
        found.append(
            Finding(
                "inversion", view, seen.number, measure, share, guess, len(shares[key]), many, meaning,
                min(low, share), max(high, share),
            )
        )  # fmt: skip
    return found


def _by_directions(check: SpanCheck, seen: RoundView, view: View, reads: Sequence[Read]) -> list[Finding]:
    """What the leading directions say of the tokens of clients whose change has no span."""
    attacked, guessed = [], []
    for each in reads:
        if not each.near:
            continue
        train = check.target.data.clients[each.seen.client].train
        right = frozenset(token for token, _ in check.right(each.seen.client)[0]) - check.usual.special
        count = check.usual.numbers(len(train))[1]
        near = torch.cat(each.near)
        near[list(check.usual.special)] = -1
        attacked.append(f1(frozenset(near.argsort(descending=True)[:count].tolist()), right))
        guessed.append(f1(frozenset(check.usual.tokens[:count]), right))
    if not attacked:
        return []
    values, chance = np.array(attacked), float(np.mean(guessed))
    low, high = share_interval(values, check.target.seed)
    least, most = share_interval(values - np.array(guessed), check.target.seed)
    return [
        Finding(
            "inversion", view, seen.number, "token F1, by leading directions", float(values.mean()), chance,
            len(values), check.size,
            "tokens near the leading directions of the change's signs, where it has no exact span; against "
            f"the usual tokens {float(values.mean()) - chance:+.3f} ({least:+.3f} to {most:+.3f})", low, high,
        )
    ]  # fmt: skip
