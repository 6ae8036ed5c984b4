"""Tokens and texts of a client from the span of its change of the first layers (DAGER)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .attack import CannotAttack, Deadline, OutOfTime, RoundView, Target
from .changes import OneChange
from .layer_inputs import LayerInputs
from .rebuild import Text, combined, grown, is_causal
from .results import Finding, View
from .span import Span
from .statistics import share_interval
from .tokens import changed_rows

PIECE = 256
"""Tokens whose inputs are computed at a time, at every position."""

Pair = tuple[int, int]
"""A token and its position; position 0 stands for all where the model's inputs do not tell them apart."""


@dataclass
class Read:
    """What the span check reads of one client's change.

    Attributes:
        seen: The change.
        span: That of the first layer, None where nothing moved.
        pairs: Tokens and positions that are in it.
        texts: What was rebuilt of them.
    """

    seen: OneChange
    span: Span | None
    pairs: set[Pair] = field(default_factory=set)
    texts: set[Text] = field(default_factory=set)

    @property
    def visible(self) -> bool:
        """Whether the span says anything."""
        return self.span is not None and self.span.visible


@dataclass(frozen=True)
class SpanCheck:
    """The span check of DAGER (Petrov et al. 2024, arXiv 2405.15586): the gradient of a matrix is a sum of
    products of errors and inputs, so that its rows are combinations of the inputs. Those of the first layer's
    attention are known for each token at each position; the ones that lie in the span of the rows are the
    client's. Texts are rebuilt of them by the same test of the second layer.

    It holds as long as steps add gradients up (SGD, with momentum too), and as there are more rows, and
    vectors have more numbers, than the client has different inputs. Adam divides gradients number by number
    and leaves no span.

    Attributes:
        first: The first layer's inputs.
        second: The second layer's; None where its matrices are not trained.
        length: Positions that are tried.
        positions: Whether an input depends on its position.
    """

    target: Target
    first: LayerInputs
    second: LayerInputs | None
    length: int
    positions: bool

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
        return cls(target, first, LayerInputs.of(parts.trainable, 1), length, not bool((one == other).all()))

    def read(self, changes: Sequence[OneChange], deadline: Deadline) -> list[Read]:
        """What the changes of clients say that all had the same state.

        Raises:
            OutOfTime: the vocabulary would take longer than is left.
        """
        found = [Read(each, self._span(self.first, each)) for each in changes]
        open_ = [each for each in found if each.visible]
        if not open_:
            return found
        self._find(open_, deadline)
        for each in open_:
            each.texts = self._texts(each, deadline)
        return found

    def _span(self, layer: LayerInputs, seen: OneChange) -> Span | None:
        names = {n: t for n, t in seen.change.items() if n in layer.matrices and n in seen.task.tensors}
        return Span.of(layer.rows(names), layer.rows({n: seen.task.tensors[n] for n in names}))

    def _find(self, reads: Sequence[Read], deadline: Deadline) -> None:
        """The pairs in the spans, among the tokens whose embeddings changed, or all of the vocabulary."""
        knowledge = self.target.knowledge
        table = None if knowledge.ties_embeddings() else knowledge.embedding()
        known = [
            changed_rows(each.seen.change[table], each.seen.task.tensors[table])
            if table is not None and table in each.seen.change
            else None
            for each in reads
        ]
        size = len(knowledge.parts.base.model.get_input_embeddings().weight)
        wanted = range(size) if None in known else sorted(set[int]().union(*(k for k in known if k)))
        length = self.length if self.positions else 1
        began = time.monotonic()
        for start in range(0, len(wanted), PIECE):
            deadline.check()
            tokens = list(wanted[start : start + PIECE])
            inputs = self.first.of_tokens(tokens, length)
            for each, allowed in zip(reads, known, strict=True):
                assert each.span is not None
                inside = each.span.holds(inputs.flatten(0, 1)).reshape(len(tokens), length)
                each.pairs |= {
                    (tokens[row], position)
                    for row, position in inside.nonzero().tolist()
                    if allowed is None or tokens[row] in allowed
                }
            pieces = -(-len(wanted) // PIECE)
            if start == 0 and deadline.fitting(time.monotonic() - began, pieces) < pieces:
                raise OutOfTime

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
        pairs = {
            (token, place if self.positions else 0) for text in texts for place, token in enumerate(text)
        }
        return pairs, {tuple(text) for text in texts}


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
    full = sum(each.span is not None and each.span.full for each in reads)
    limited = count - open_ - still - full
    reasons = [
        (full, "the change has every direction, as after Adam, noise, codes or too many tokens"),
        (limited, "there are as many directions as rows of the trained matrices, too few for the tokens"),
        (still, "the matrices did not move, as LoRA's first factor while the second is zero"),
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
    if not open_:
        return found
    usual = _usual(check)
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
    size = len(check.target.knowledge.parts.base.model.get_input_embeddings().weight)
    many = size * (check.length if check.positions else 1)
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


def _usual(check: SpanCheck) -> list[Pair]:
    """Pairs by how many of a thousand texts have them, the most frequent first."""
    target = check.target
    order = np.random.default_rng([target.seed, 36]).permutation(len(target.texts))[:1000]
    counts = Counter[Pair]()
    for place in order:
        for text in target.knowledge.texts(target.texts[int(place)]):
            counts.update({(t, p if check.positions else 0) for p, t in enumerate(text)})
    return sorted(counts, key=lambda pair: (-counts[pair], pair))
