"""The two parts, put together from those of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fedcustom.core.errors import ModelError, RunError
from fedcustom.methods.prefix.method import Prefix
from fedcustom.methods.prefix.settings import PrefixSettings
from fedcustom.methods.tuning.feed_forward import find_feed_forward
from fedcustom.methods.tuning.peft_support import clean_name
from fedcustom.methods.tuning.technique import TrainableModel
from fedcustom.methods.tuning.widening import Widening

from .settings import KvFeedForwardSettings

FILE = "feed_forward_slots.safetensors"
"""Beside the prefix in ``prefix/``: neither PEFT nor transformers load the two together."""


class KvFeedForward:
    """A prefix of text in a model whose feed-forward networks are wider.

    What travels: the prefix of (layers, 2, heads, length, size), the slots' rows, biases and columns, and
    the head.
    """

    def __init__(self, settings: KvFeedForwardSettings) -> None:
        self.settings = settings

    def attach(self, base: Any, seed: int) -> TrainableModel:
        """Widen the model, and put the pairs in front of its layers' keys and values.

        Raises:
            ModelError: the model's feed-forward networks cannot be widened, or it takes no keys and values.
        """
        found = find_feed_forward(base)
        if found is None:
            raise ModelError(
                f"method kv_feed_forward does not fit {base.name}: no networks that can be widened"
            )
        widening = Widening(base.model, found, self.settings.feed_forward_slots, seed)
        trainable = Prefix(PrefixSettings(kind="kv", length=self.settings.length)).attach(base, seed)
        names = widening.names()
        slots = {
            name: parameter
            for full, parameter in trainable.model.named_parameters()
            if (name := clean_name(full)) in names
        }
        for parameter in slots.values():
            parameter.requires_grad_(True)
        trainable.parameters |= slots
        save_prefix, load_prefix = trainable.save, trainable.load

        def save(folder: Path) -> None:
            save_prefix(folder / "prefix")
            save_file(
                {name: parameter.detach().contiguous() for name, parameter in slots.items()}, folder / FILE
            )

        def load(folder: Path) -> None:
            load_prefix(folder / "prefix")
            tensors = load_file(folder / FILE)
            if tensors.keys() != slots.keys():
                raise RunError(f"{folder / FILE}: holds slots of another model")
            for name, parameter in slots.items():
                parameter.data.copy_(tensors[name])

        trainable.save, trainable.load = save, load
        return trainable
