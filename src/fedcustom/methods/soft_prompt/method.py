"""Prompt tuning (Lester et al. 2021): learnt vectors in front of the embedded input."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from ...models.load import Base
from ..peft_support import attach_peft, head_names, peft_parameters, save_peft, task_type
from ..settings import TuningSettings
from ..tuning import Tuned

PEFT_NAME, NAME = "prompt_encoder.embedding.weight", "soft_prompt"


class SoftPromptSettings(TuningSettings):
    """Learnt vectors in front of the embedded input."""

    default_learning_rate: ClassVar[float] = 3e-2
    pads_decoders_left: ClassVar[bool] = True

    name: Literal["soft_prompt"] = "soft_prompt"
    length: int = Field(16, ge=1, le=100_000, description="Number of learnt vectors")
    init: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary",
        description="random: normal; vocabulary: embeddings of random tokens; text: those of init_text",
    )
    init_text: str = Field(
        "Read the text and answer.", min_length=1, description="Text for init = text, repeated to length"
    )


class SoftPrompt:
    """What travels: ``soft_prompt`` of (length, embedding width); twice the length for an encoder-decoder."""

    def __init__(self, settings: SoftPromptSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> Tuned:
        """Wrap the model with PEFT's prompt tuning.

        A decoder that classifies reads its answer off the last position, which PEFT cannot find behind
        padding, so its inputs are padded on the left.
        """
        from peft import PromptTuningConfig

        settings = self.settings
        config = PromptTuningConfig(
            task_type=task_type(base),
            num_virtual_tokens=settings.length,
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
        config.tokenizer_name_or_path = None  # a folder of this machine; not needed to load the adapter
        parameters = peft_parameters(model)
        parameters = {NAME if name == PEFT_NAME else name: p for name, p in parameters.items()}
        return Tuned(
            model,
            parameters,
            head_names(base, parameters),
            save=lambda folder: save_peft(base, model, folder),
        )
