"""Low-rank adaptation (Hu et al. 2021), averaged factor by factor (FedIT, Zhang et al. 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from ...models.load import Base
from ..peft_support import attach_peft, peft_tuned, task_type
from ..settings import TuningSettings
from ..tuning import Tuned


class LoraSettings(TuningSettings):
    """Low-rank adaptation of chosen matrices."""

    default_learning_rate: ClassVar[float] = 2e-3

    name: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=4096, description="Rank r of the change")
    alpha: float = Field(16.0, gt=0, description="The change is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training")
    target_modules: list[str] | None = Field(
        None,
        description="Matrices to adapt, by name endings; unset: PEFT's choice; ['all-linear']: all",
    )


class Lora:
    """FedIT: the means of A and of B are taken apart, and mean(B) mean(A) is not the mean of B A.

    What travels: A of (rank, in) and B of (out, rank) for each adapted matrix. B starts at zero, A at the
    same random values for every client.
    """

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> Tuned:
        """Wrap the chosen matrices with PEFT's LoRA layers."""
        from peft import LoraConfig

        chosen: Any = self.settings.target_modules
        if chosen == ["all-linear"] or (chosen is None and not known_to_peft(base)):
            chosen = "all-linear"
        config = LoraConfig(
            task_type=task_type(base),
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,  # type: ignore[arg-type]
            lora_dropout=self.settings.dropout,
            target_modules=chosen,
            modules_to_save=list(base.head) or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = attach_peft(base, config, "lora")
        tuned = peft_tuned(base, model)
        if self.settings.dropout:
            tuned.active_dropout = [m for name, m in model.named_modules() if name.endswith("lora_dropout")]
        return tuned


def known_to_peft(base: Base) -> bool:
    """Whether PEFT has a choice of matrices for this type of model."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    return base.model.config.model_type in CHOICES
