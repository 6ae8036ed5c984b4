"""Padding: whether a text's result depends on the texts that share its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.library_errors import in_one_line
from ..core.memory_errors import out_of_memory
from ..data.tokens import TokenizedExample, collate
from .forward import classification_logits, pooled, target_losses

if TYPE_CHECKING:
    from .load import Base

Padding = Literal["right", "none"]
"""How rows of unlike lengths share a batch: with padding on the right, or not at all, since a model lets
padding change what it makes of a text. Then only rows of one length do.
"""

TOLERANCE = 1e-3
"""Difference of a text's scores, relative to the difference between two texts, that rounding explains."""

TRIAL_TEXTS = ("one", "one two three four five six seven eight nine ten eleven twelve thirteen fourteen")
"""A short text and a longer one, for trial passes."""

TRIAL_TOKENS = 16
"""Most tokens of a text in a trial pass."""

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Errors by which the code of a model says that it cannot take what it is given."""


@contextmanager
def trial(model: nn.Module, refusal: Callable[[str], str]) -> Iterator[None]:
    """A pass that is tried: where the code of ``model`` fails, ``refusal`` makes the message of a ModelError
    of the reason. The model is left as it was: BigBird, for one, gives up sparse attention for good when it
    meets a short text.

    Raises:
        ModelError: the code fails, but for want of memory, which says nothing about the model.
    """
    kept = [(m, dict(m._modules), _plain_values(m)) for m in model.modules()]
    try:
        yield
    except FAILURES as error:
        if out_of_memory(error):
            raise
        raise ModelError(refusal(in_one_line(error))) from error
    finally:
        for module, children, values in kept:
            module._modules.update(children)
            module.__dict__.update(values)


def _plain_values(module: nn.Module) -> dict[str, Any]:
    return {name: v for name, v in vars(module).items() if isinstance(v, str | int | float | None)}


def padding_of(base: Base, *, classifies: bool) -> Padding:
    """How rows must share a batch of a model as it was loaded; ``classifies`` where it has a head for that.

    Raises:
        ModelError: a text's result depends on the other texts of its batch, or the model fails.
    """
    task, padding = base.task, base.tokenizer.pad_token_id
    ids = trial_ids(base)
    rows = [TokenizedExample.of(one, other, 0) for one, other in zip(ids, reversed(ids), strict=True)]
    if not classifies and task.kind != "generation":
        task = replace(task, kind="classification")  # of whose batches the inputs alone are used

    def scores(chosen: Sequence[int]) -> Tensor:
        some = [rows[i] for i in chosen]
        batch = collate(some, padding, task, sequence_to_sequence=base.sequence_to_sequence)
        batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
        if classifies:
            return classification_logits(base.model, batch)
        if task.kind == "generation":
            losses, counts = target_losses(
                base.model, batch, sequence_to_sequence=base.sequence_to_sequence, output=base.output
            )
            return losses / counts.clamp(min=1)
        return pooled(base.model, batch)

    return find_padding(base.model, scores, base.name, allowed=classifies or task.kind == "generation")


def trial_ids(base: Base) -> tuple[list[int], list[int]]:
    """Token ids of a short and of a longer text: ordinary tokens, where the tokenizer has none for the words
    of :data:`TRIAL_TEXTS`.
    """
    short, long = (
        base.tokenizer(text, truncation=True, max_length=TRIAL_TOKENS)["input_ids"] for text in TRIAL_TEXTS
    )
    special = set(base.tokenizer.all_special_ids)
    if special.issuperset(short) or special.issuperset(long) or len(short) == len(long):
        ordinary = [token for token in range(len(base.tokenizer)) if token not in special][:TRIAL_TOKENS]
        short, long = ordinary[:1] or short, ordinary or long
    return short, long


def find_padding(
    model: nn.Module, scores: Callable[[Sequence[int]], Tensor], name: str, *, allowed: bool = True
) -> Padding:
    """How rows of ``model`` must share a batch: ``scores`` gives those of some of two rows of unlike lengths,
    as (rows, ...).

    Where padding changes a score, as in models that mix positions without a mask (FNet, ConvBERT) or read
    the last position (XLNet), rows of one length must give the same together as alone. ``allowed`` is
    whether the caller can do without padding.

    Raises:
        ModelError: a row's scores depend on the other rows of its batch in any case, or the model fails.
    """
    with (
        trial(model, lambda reason: f"model.base: a trial pass through {name} fails: {reason}"),
        torch.inference_mode(),
    ):
        alone = [scores([row])[0] for row in (0, 1)]
        together, twice = scores([0, 1]), scores([0, 0])
    if not all(bool(torch.isfinite(each).all()) for each in (*alone, together, twice)):
        return "right"  # weights that are no numbers are reported where they matter
    size = max(float(each.abs().max()) for each in alone)
    scale = max(_gap(alone[0], alone[1]), 1e-2 * size, 1e-6)
    if all(_gap(together[row], alone[row]) <= TOLERANCE * scale for row in (0, 1)):
        return "right"
    if allowed and all(_gap(each, alone[0]) <= TOLERANCE * scale for each in twice):
        return "none"
    raise ModelError(
        f"model.base: what {name} makes of a text depends on the other texts of its batch "
        f"(scores differ by {max(_gap(together[row], alone[row]) for row in (0, 1)) / scale:.0%} of what two "
        "texts differ by), so it cannot be used here; choose another base model"
    )


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
