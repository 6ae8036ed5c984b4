"""Likelihoods of short continuations of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ModelError
from .load import Base

Ids = list[int]
Scores = np.ndarray[Any, np.dtype[np.float64]]


@torch.inference_mode()
def continuation_scores(
    base: Base,
    prompts: Sequence[str],
    continuations: Sequence[str],
    *,
    batch_size: int,
    prefix: Tensor | None = None,
) -> Scores:
    """Log-likelihoods in nats of (prompts, continuations): sum_t log p(v_t | prompt, v_<t).

    Each prompt is computed once, and its keys and values serve all continuations. An encoder-decoder reads
    the prompt and writes the continuation, which then ends with the end-of-sequence token. ``prefix``
    (virtual tokens, embedding width) is put in front of the embedded prompts.

    Raises:
        ModelError: the tokenizer makes no token of a continuation.
    """
    base.model.eval()
    sources = prompt_ids(base, prompts)
    reads = base.architecture == "encoder-decoder"
    targets = base.tokenizer(list(continuations), add_special_tokens=False)["input_ids"]
    for text, target in zip(continuations, targets, strict=True):
        if not target:
            raise ModelError(f"model.base: the tokenizer of {base.name} makes no token of the label {text!r}")
    if reads:
        targets = [[*target, base.tokenizer.eos_token_id] for target in targets]
    score = _encoder_decoder if reads else _decoder
    result = np.zeros((len(prompts), len(continuations)))
    for positions in _batches(sources, batch_size, mixed=reads or _takes_positions(base)):
        ids, mask = _padded([sources[i] for i in positions], base.tokenizer.pad_token_id)
        with base.autocast():
            scores = score(base, ids.to(base.device), mask.to(base.device), targets, prefix)
        result[positions] = scores.double().cpu().numpy()
    return result


def prompt_ids(base: Base, prompts: Sequence[str]) -> list[Ids]:
    """Token ids with the tokenizer's special tokens, but for a closing end-of-sequence token before a
    decoder's continuation. A prompt without any token is the tokenizer's first special token.
    """
    tokenizer = base.tokenizer
    ids: list[Ids] = tokenizer(list(prompts))["input_ids"] if prompts else []
    if base.architecture == "decoder":
        ids = [row[:-1] if len(row) > 1 and row[-1] == tokenizer.eos_token_id else row for row in ids]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [row or [first] for row in ids]


def _decoder(base: Base, ids: Tensor, mask: Tensor, targets: list[Ids], prefix: Tensor | None) -> Tensor:
    model, lengths = base.model, mask.sum(dim=1)
    inputs: dict[str, Any] = {"input_ids": ids}
    if prefix is not None:
        embedded = model.get_input_embeddings()(ids)
        front = prefix.to(embedded).expand(len(ids), -1, -1)
        inputs = {"inputs_embeds": torch.cat([front, embedded], dim=1)}
        mask = torch.cat([mask.new_ones(front.shape[:2]), mask], dim=1)
        lengths = lengths + front.shape[1]
    several = max(map(len, targets)) > 1
    # Only the columns from the shortest prompt's last token on need logits.
    keep = mask.shape[1] - int(lengths.min()) + 1
    output = model(
        **inputs, attention_mask=mask, use_cache=several, logits_to_keep=keep, **_positions(base, mask, 0)
    )
    last = output.logits[torch.arange(len(ids)), lengths - lengths.min()].float().log_softmax(dim=-1)
    scores: Tensor = last[:, [target[0] for target in targets]]
    if not several:
        return scores
    cache = output.past_key_values
    cache.batch_repeat_interleave(len(targets))
    rows, shown = _padded([target[:-1] for target in targets], base.tokenizer.pad_token_id)
    wanted, _ = _padded([target[1:] for target in targets], base.tokenizer.pad_token_id)
    rows, shown, wanted = (part.to(ids.device).repeat(len(ids), 1) for part in (rows, shown, wanted))
    past = mask.repeat_interleave(len(targets), dim=0)
    whole = torch.cat([past, shown], dim=1)
    logits = model(
        input_ids=rows,
        attention_mask=whole,
        past_key_values=cache,
        **_positions(base, whole, past.shape[1]),
    ).logits.float()
    rest = logits.log_softmax(dim=-1).gather(2, wanted.unsqueeze(-1)).squeeze(-1) * shown
    sums: Tensor = scores + rest.sum(dim=1).view(len(ids), len(targets))
    return sums


def _encoder_decoder(
    base: Base, ids: Tensor, mask: Tensor, targets: list[Ids], prefix: Tensor | None
) -> Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    assert prefix is None, "virtual tokens are for decoders"
    states = base.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    labels, shown = _padded(targets, base.tokenizer.pad_token_id)
    labels, shown = (part.to(ids.device).repeat(len(ids), 1) for part in (labels, shown))
    logits = base.model(
        encoder_outputs=BaseModelOutput(states.repeat_interleave(len(targets), dim=0)),
        attention_mask=mask.repeat_interleave(len(targets), dim=0),
        labels=labels,
    ).logits.float()
    each = logits.log_softmax(dim=-1).gather(2, labels.unsqueeze(-1)).squeeze(-1) * shown
    sums: Tensor = each.sum(dim=1).view(len(ids), len(targets))
    return sums


def _takes_positions(base: Base) -> bool:
    return "position_ids" in inspect.signature(base.model.forward).parameters


def _positions(base: Base, mask: Tensor, start: int) -> dict[str, Tensor]:
    """Where the columns from ``start`` on stand, not counting padding."""
    if not _takes_positions(base):
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, start:]}


def _batches(rows: Sequence[Ids], batch_size: int, *, mixed: bool) -> Iterator[list[int]]:
    """Positions in batches of similar length, longest first, or of equal length where they may not be
    mixed.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == batch_size or (not mixed and len(rows[i]) != len(rows[batch[0]]))):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(rows: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    width = max(1, *map(len, rows)) if rows else 1
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return ids, mask
