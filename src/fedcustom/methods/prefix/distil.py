"""Distillation of a stacked prefix into one of the set length, on the server's unlabelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...aggregation.prefix_stacking import Stacked
from ...core.errors import DataError, ModelError
from ...models.configuration import context_length
from ...models.load import Base
from .settings import PrefixSettings

BATCH = 16


def read_texts(path: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"method.public_text: {path}: cannot be read as UTF-8 text: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise DataError(f"method.public_text: {path}: holds no text")
    return texts


class Distiller:
    """Fits a prefix such that the frozen base's last hidden states on public texts are those that the stacked
    prefix gives, in the mean square over tokens (Adam, a batch of 16 texts a step).

    The teacher's slots have the bias log(w_k), as in ``stack_prefixes``; its texts stand at the same
    positions as the student's. Deterministic.
    """

    def __init__(self, base: Base, settings: PrefixSettings, path: str) -> None:
        texts = read_texts(path)
        if base.architecture == "encoder-decoder":
            raise ModelError(
                f"method.compression = 'distil' does not fit {base.name}: not for encoder-decoders; "
                "use 'cluster'"
            )
        self.base, self.settings = base, settings
        self.body: Any = getattr(base.model, base.model.base_model_prefix, base.model)
        limit = (context_length(base.model.config) or 10**6) - settings.length
        self.batches = [
            base.tokenizer(
                texts[i : i + BATCH],
                padding=True,
                truncation=True,
                max_length=min(128, limit),
                return_tensors="pt",
                return_token_type_ids=False,
            ).to(base.device)
            for i in range(0, len(texts), BATCH)
        ]

    def __call__(self, stacked: Stacked, start: Tensor) -> Tensor:
        """The prefix, in the shape of ``start``."""
        self.body.eval()
        device = self.base.device
        stacked = Stacked(stacked.prefix.to(device), stacked.bias.to(device))
        start = start.to(device)
        student = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([student], lr=self.settings.distil_learning_rate)
        teachers: dict[int, Tensor] = {}
        silent = start.new_zeros(start.shape[3])
        with torch.enable_grad():
            for step in range(self.settings.distil_steps):
                number = step % len(self.batches)
                batch = self.batches[number]
                if number not in teachers:
                    with torch.no_grad():
                        # log(w_k) is the same in every layer and head.
                        teachers[number] = self._states(batch, stacked.prefix, stacked.bias[0, 0], start)
                states = self._states(batch, student, silent, start)
                mask = batch["attention_mask"][:, :, None]
                loss = ((states - teachers[number]).square() * mask).sum() / mask.sum()
                (student.grad,) = torch.autograd.grad(loss, student)
                optimizer.step()
        return student.detach().cpu()

    def _states(self, batch: Any, prefix: Tensor, bias: Tensor, like: Tensor) -> Tensor:
        """Last hidden states of (texts, tokens, width) with a prefix whose slots have a bias."""
        from transformers import DynamicCache

        ids, given = batch["input_ids"], batch["attention_mask"]
        rows, tokens = ids.shape
        slots = prefix.shape[3]
        lowest = torch.finfo(torch.float32).min
        own = torch.zeros(rows, 1, tokens, tokens, device=ids.device)
        own = own.masked_fill(given[:, None, None, :] == 0, lowest)
        if self.base.architecture == "decoder":
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).triu(1)
            own = own.masked_fill(later, lowest)
        mask = torch.cat([bias.expand(rows, 1, tokens, slots), own], dim=-1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        positions = torch.arange(like.shape[3], like.shape[3] + tokens, device=ids.device)
        with self.base.autocast():
            states: Tensor = self.body(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions.expand(rows, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return states.float()
