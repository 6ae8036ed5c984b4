"""Full fine-tuning: every weight of the model is trained and sent."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import RunError
from ...models.load import Base
from ...models.quantised_layers import quantised_layers
from ..tuning.loading_page import loading_page
from ..tuning.peft_support import head_names
from ..tuning.technique import TrainableModel
from .settings import FullSettings

SHARD = "4GB"
"""Largest file of a model that is saved whole; a larger model has several, and an index of them."""


class Full:
    """Full fine-tuning (FedAvg of all weights, McMahan et al. 2017). What travels: the whole model."""

    def __init__(self, settings: FullSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Train every parameter; tied ones are one."""
        model = base.model.requires_grad_(True)
        parameters = dict(sorted(model.named_parameters()))

        def save(folder: Path) -> None:
            model.save_pretrained(folder, max_shard_size=SHARD)
            (folder / "README.md").write_text(loading_page(base, adapter=False), encoding="utf-8")

        def load(folder: Path) -> None:
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            found = model.load_state_dict(saved.state_dict(), strict=False)
            # Of quantised layers nothing is trained but biases; their stored weights stay.
            places = {layer.place for layer in quantised_layers(model)}
            keys = (*found.missing_keys, *found.unexpected_keys)
            if others := [key for key in keys if key.rpartition(".")[0] not in places]:
                raise RunError(f"{folder}: holds weights of another model than the run's: {others[0]}")

        trainable = TrainableModel(model, parameters, head_names(base, parameters), save, load)
        trainable.whole = True
        output = model.get_output_embeddings()
        inner = (n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not output)
        weights = {f"{name}.weight" for name in inner}
        trainable.matrices = {name: 1 for name in parameters if name in weights - trainable.head}
        return trainable
