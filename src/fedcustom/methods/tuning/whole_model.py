"""Partly trained models that are exported whole (BitFit, full fine-tuning, the probe)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

from torch import nn

from ...models.load import Base
from ..full.method import Full
from ..full.settings import FullSettings
from .peft_support import head_names
from .technique import TrainableModel


def partly_trained(base: Base, seed: int, names: Collection[str]) -> TrainableModel:
    """Full fine-tuning of these parameters and the head alone; all others are frozen and do not travel."""
    whole = Full(FullSettings()).attach(base, seed)
    chosen = head_names(base, whole.parameters).union(names)
    parameters = {name: p for name, p in whole.parameters.items() if name in chosen}
    base.model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def save(folder: Path) -> None:
        with in_float32(base.model):
            whole.save(folder)

    matrices = {name: count for name, count in whole.matrices.items() if name in parameters}
    head = head_names(base, parameters)
    return dataclasses.replace(whole, parameters=parameters, head=head, save=save, matrices=matrices)


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """For the time of the context all parameters are float32, so that what was trained in it is not rounded.

    ``transformers`` loads a model in one dtype, that of its first parameter; frozen ones may be bfloat16.
    """
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.float()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
