"""Log-likelihoods of the answers of preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.tokens import Batch, TokenizedExample, by_length, collate
from .forward import target_losses
from .inference import Scores, to_device
from .load import Base

REFERENCE = "reference"
"""The key under which a batch of pairs has the reference model's log-likelihoods, (pairs, 2), in float32, in
which they are computed.
"""

OTHER = "rejected_"
"""What the keys of the rejected answers begin with."""


def collate_pairs(rows: Sequence[TokenizedExample], base: Base) -> Batch:
    """One batch of pairs, where the model is: prompts with the chosen answers, as any examples, and under
    keys with :data:`OTHER` with the rejected ones. Only answers have labels.
    """
    padding, seq2seq = base.tokenizer.pad_token_id, base.sequence_to_sequence
    chosen = collate(rows, padding, base.task, sequence_to_sequence=seq2seq)
    rejected = collate([row.other() for row in rows], padding, base.task, sequence_to_sequence=seq2seq)
    reference = [row.rejected.reference for row in rows if row.rejected is not None]
    return to_device(
        {
            **chosen,
            **{OTHER + key: tensor for key, tensor in rejected.items()},
            REFERENCE: torch.tensor(reference),
        },
        base.device,
    )


def pair_likelihoods(model: Any, batch: Batch, base: Base) -> Tensor:
    """Log-likelihoods in nats of the chosen and the rejected answers, (pairs, 2), by two forward passes:
    each over rows of the pairs' order.
    """
    sides = (
        {key: batch[key] for key in ("input_ids", "attention_mask", "labels")},
        {key: batch[OTHER + key] for key in ("input_ids", "attention_mask", "labels")},
    )
    with base.autocast():
        losses = [
            target_losses(model, side, sequence_to_sequence=base.sequence_to_sequence, output=base.output)[0]
            for side in sides
        ]
    return -torch.stack(losses, dim=1)


@torch.inference_mode()
def score_pairs(model: Any, base: Base, rows: Sequence[TokenizedExample], batch_size: int) -> Scores:
    """The same for many pairs, (pairs, 2). The same pairs in the same order share the same batches."""
    model.eval()
    scores = torch.zeros(len(rows), 2, dtype=torch.float64)
    for positions in by_length(rows, batch_size, equal=base.padding == "none"):
        batch = collate_pairs([rows[i] for i in positions], base)
        scores[positions] = pair_likelihoods(model, batch, base).double().cpu()
    found: Scores = scores.numpy()
    return found
