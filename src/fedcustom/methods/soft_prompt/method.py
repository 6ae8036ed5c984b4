"""Prompt tuning (Lester et al. 2021): learnt vectors in front of the embedded input; with an encoder p-tuning
(Liu et al. 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ...models.first_token import reading
from ...models.load import Base
from ..tuning.peft_support import (
    attach_peft,
    leave_out_virtual_tokens,
    peft_parameters,
    task_type,
    tuned_with,
)
from ..tuning.reparametrisation import Network, reparametrise
from ..tuning.technique import TrainableModel
from .settings import SoftPromptSettings

PEFT_NAME, NAME = "prompt_encoder.embedding.weight", "soft_prompt"


class SoftPrompt:
    """What travels: ``soft_prompt`` of (length, embedding width); twice the length for an encoder-decoder.

    The encoder of p-tuning stays at the client: it is started anew in each round such that it changes nothing
    at first, and its output is added to the prompt before that is sent. A rate near 1e-3 suits it.
    """

    def __init__(self, settings: SoftPromptSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Wrap the model with PEFT's prompt tuning."""
        from peft import PromptTuningConfig

        settings = self.settings
        config = PromptTuningConfig(
            task_type=task_type(base),
            num_virtual_tokens=settings.length,
            # PEFT takes the width of the hidden states, which is another in ALBERT, ELECTRA or OPT. Layers
            # and heads are not used here; PEFT asks for them where configurations name them otherwise.
            token_dim=base.model.get_input_embeddings().weight.shape[1],
            num_layers=getattr(base.model.config, "num_hidden_layers", 1),
            num_attention_heads=getattr(base.model.config, "num_attention_heads", 1),
            prompt_tuning_init={"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}[
                settings.init
            ],
            prompt_tuning_init_text=settings.init_text if settings.init == "text" else None,
            tokenizer_name_or_path=base.path if settings.init == "text" else None,
            modules_to_save=list(base.head) or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = attach_peft(base, config, "soft_prompt")
        leave_out_virtual_tokens(base.model, settings.length)
        config.tokenizer_name_or_path = None  # a folder of this machine; not needed to load the adapter
        parameters = peft_parameters(model)
        if settings.encoder == "none":
            parameters = {NAME if name == PEFT_NAME else name: p for name, p in parameters.items()}
            trainable = tuned_with(base, model, parameters)
            trainable.matrices = {NAME: 1}
        else:
            del parameters[PEFT_NAME]
            trainable = tuned_with(base, model, parameters)
            reparametrise(trainable, model, NAME, Network(settings.encoder, settings.encoder_width, seed))
        trainable.base_model = base.model
        # Without padding the last position is that of the last token.
        if base.architecture == "decoder" and base.task.kind == "classification" and base.padding != "none":
            trainable.model = DecoderClassifier(model, base)
        return trainable


class DecoderClassifier(nn.Module):
    """Reads a decoder's answer off the last token of each input.

    Given embeddings in place of token ids, ``transformers`` cannot see where padding begins and reads the
    answer off the last position of the batch. Without padding both are the same.
    """

    def __init__(self, wrapped: Any, base: Base) -> None:
        super().__init__()
        self.wrapped, self.config = wrapped, base.model.config
        self.body = base.model.base_model
        self.head = getattr(base.model, base.head[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits of (examples, labels) for inputs padded on the right."""
        prompt = self.wrapped.get_prompt(batch_size=len(input_ids))
        embedded = self.wrapped.word_embeddings(input_ids)
        last = prompt.shape[1] + attention_mask.sum(dim=1) - 1
        with reading(last):
            states = self.body(
                inputs_embeds=torch.cat([prompt.to(embedded.dtype), embedded], dim=1),
                attention_mask=torch.cat([attention_mask.new_ones(prompt.shape[:2]), attention_mask], dim=1),
            ).last_hidden_state
        return SequenceClassifierOutput(logits=self.head(states[torch.arange(len(states)), last]))
