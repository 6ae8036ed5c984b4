"""Sentence embeddings by a base model: pooled token states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.encode import Cut, encode
from ..data.templates import Field
from ..data.truncation import KEEP_START, CutTally, Truncation
from .forward import pooled
from .inference import to_device
from .load import Base

STEP, ROWS = 16, 16
"""Of what lengths passes over texts are, in tokens, and of how many texts on the CPU."""

WHOLE = Truncation(KEEP_START)
"""Texts lose their end."""


@torch.inference_mode()
def embed(
    base: Base,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 64,
    how: Truncation = WHOLE,
    fields: Sequence[tuple[Field, ...]] | None = None,
    tally: CutTally | None = None,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Unit vectors of (texts, width); texts of more than ``max_length`` tokens lose what ``how`` says, by
    default their end. ``fields`` says which part of each text comes from which column, ``tally`` counts what
    is cut.

    On the CPU a text's vector does not depend on what it is embedded with, bit for bit: passes have one shape
    for each length in steps of :data:`STEP` tokens, because matrix products of other shapes round otherwise.
    """
    base.model.eval()
    device, padding = base.device, base.tokenizer.pad_token_id
    rows = ROWS if device.type == "cpu" else batch_size
    result = np.zeros((len(texts), base.model.config.hidden_size), dtype=np.float32)
    if not texts:
        return result
    cut = Cut(max_length, how)
    ids: list[list[int]] = []
    for encoded in encode(base.tokenizer, texts, cut, fields, base.token_rules):
        ids.append(encoded.ids)
        if tally is not None:
            tally.add(sum(encoded.lost.values()))
    groups: dict[int, list[int]] = {}
    for position, each in enumerate(ids):
        groups.setdefault(min(max_length, -(-max(1, len(each)) // STEP) * STEP), []).append(position)
    for width, members in sorted(groups.items(), reverse=True):
        for start in range(0, len(members), rows):
            positions = members[start : start + rows]
            given = np.full((rows, width), padding, dtype=np.int64)
            mask = np.zeros((rows, width), dtype=np.int64)
            mask[:, 0] = 1
            for row, position in enumerate(positions):
                given[row, : len(ids[position])] = ids[position]
                mask[row, : len(ids[position])] = 1
            batch = {"input_ids": torch.from_numpy(given), "attention_mask": torch.from_numpy(mask)}
            with base.autocast():
                vectors = pooled(base.model, to_device(batch, device))
            result[positions] = vectors[: len(positions)].cpu().numpy()
    return result
