"""Forward passes: logits and losses of a batch, computed at the positions that count."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from ..data.tokens import IGNORED, Batch
from .first_token import classifying
from .output import OutputLayer

LABEL_OFFSET = "label_offset"
"""The key under which a batch may have what is added to its logits, (labels,) or (examples, labels)."""


def classification_logits(model: Any, batch: Batch) -> Tensor:
    """Logits of (examples, labels) in float32."""
    with classifying(batch["input_ids"]):
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def classification_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each example; what :data:`LABEL_OFFSET` names is added to the logits."""
    logits = classification_logits(model, batch)
    if LABEL_OFFSET in batch:
        logits = logits + batch[LABEL_OFFSET]
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def classification_loss(model: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over examples."""
    return classification_losses(model, batch).mean()


def target_losses(
    model: Any, batch: Batch, *, sequence_to_sequence: bool, output: OutputLayer | None = None
) -> tuple[Tensor, Tensor]:
    """Per example: the summed loss in nats over target tokens, and how many target tokens there are.

    With an ``output`` layer that serves the model, only target positions become logits.
    """
    labels = batch["labels"]
    if sequence_to_sequence:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).logits
        return _losses(logits, labels), (labels != IGNORED).sum(dim=1)
    wanted = labels[:, 1:]
    counts = (wanted != IGNORED).sum(dim=1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    # Counted from the right, so that virtual tokens which a method puts in front do not shift positions.
    if output is not None and output.serves(model):
        places = wanted != IGNORED
        states = output.states(model, **inputs)[:, -labels.shape[1] : -1][places]
        losses = output.losses(states, wanted[places])
        rows = places.nonzero()[:, 0]
        return losses.new_zeros(len(labels)).index_add(0, rows, losses), counts
    # Only the columns from the last prompt token that precedes a target need logits.
    first = int((labels != IGNORED).any(dim=0).int().argmax())
    keep = labels.shape[1] - max(first - 1, 0)
    logits = model(**inputs, logits_to_keep=keep).logits[:, -keep:-1]
    return _losses(logits, wanted[:, 1 - keep :]), counts


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Each row's summed loss, from logits of (rows, tokens, vocabulary)."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(wanted.shape).sum(dim=1)


def generation_loss(
    model: Any, batch: Batch, *, sequence_to_sequence: bool, output: OutputLayer | None = None
) -> Tensor:
    """Mean loss over the batch's target tokens."""
    losses, counts = target_losses(model, batch, sequence_to_sequence=sequence_to_sequence, output=output)
    return losses.sum() / counts.sum().clamp(min=1)


def pooled(model: Any, batch: Batch) -> Tensor:
    """Unit vectors (texts, width) in float32: the mean of the last layer's states over the tokens that are no
    padding (Reimers and Gurevych 2019), divided by its length.

    ``model`` is an encoder's body, or a language model of any kind (an encoder-decoder's encoder is asked).
    """
    body = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    if hasattr(body, "lm_head"):
        body = body.base_model
    states = body(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return functional.normalize(mean, dim=1)
