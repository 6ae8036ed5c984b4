"""Likelihoods token by token."""

from __future__ import annotations

import torch

from fedcustom.models.load import Base


def label_log_probability(base: Base, prompt: str, label: str, prefix: torch.Tensor | None) -> float:
    """log p(label | prompt), token by token, without cache, batch or padding."""
    before = base.tokenizer(prompt)["input_ids"]
    after = base.tokenizer(label, add_special_tokens=False)["input_ids"]
    total = 0.0
    if base.architecture == "encoder-decoder":
        written = [base.model.config.decoder_start_token_id]
        for token in [*after, base.tokenizer.eos_token_id]:
            with torch.no_grad():
                odds = base.model(
                    input_ids=torch.tensor([before]), decoder_input_ids=torch.tensor([written])
                ).logits[0, -1]
            total += float(odds.log_softmax(-1)[token])
            written.append(token)
        return total
    for place, token in enumerate(after):
        ids = torch.tensor([[*before, *after[:place]]])
        with torch.no_grad():
            inputs = base.model.get_input_embeddings()(ids)
            if prefix is not None:
                inputs = torch.cat([prefix.unsqueeze(0), inputs], dim=1)
            odds = base.model(inputs_embeds=inputs).logits[0, -1]
        total += float(odds.log_softmax(-1)[token])
    return total
