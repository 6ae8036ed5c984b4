"""Bottleneck adapters (Houlsby et al. 2019) beside the feed-forward networks: the parallel adapter of
"Towards a Unified View of Parameter-Efficient Transfer Learning" (He et al. 2022, table 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...core.errors import ModelError, RunError
from ...models.load import Base
from ..tuning.feed_forward import find_feed_forward
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained
from .layers import Widened, WidenedInput, WidenedOutput
from .settings import AdapterSettings


class Adapter:
    """An adapter with the feed-forward network's own non-linearity, so that both are one wider network.

    With f the non-linearity, the parallel adapter adds U f(D x + c) to W2 f(W1 x + b1) + b2. That sum is::

        [W2, U] f([W1; D] x + [b1; c]) + b2

    a feed-forward network of ``width`` more hidden units. Gated networks W2 (f(G x) * (W1 x)) get rows D in
    both G and W1. D starts random, the same at every client, U and c at zero, so that nothing changes at
    first. The paper's scale s of the change is 1 here.

    What travels: D of (width, in), c of (width) where the network has such a bias, and U of (out, width), for
    each network, and the head. The customised model is exported as a ``transformers`` model whose
    configuration says that its feed-forward networks are wider.
    """

    def __init__(self, settings: AdapterSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Put extra hidden units beside those of every feed-forward network.

        Raises:
            ModelError: the model has no feed-forward networks that can be widened by their configuration.
        """
        model, width = base.model, self.settings.width
        found = find_feed_forward(base)
        if found is None:
            raise ModelError(
                f"method adapter does not fit {base.name}: its {model.config.model_type} code has no "
                "feed-forward networks of plain matrices whose width is a setting; use method lora"
            )
        layers: dict[str, Widened] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in found.inputs:
                layers[name] = WidenedInput(model.get_submodule(name), width)
            for name in found.outputs:
                layers[name] = WidenedOutput(model.get_submodule(name), width)
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        chosen = {f"{name}.adapter.{kind}" for name in layers for kind in ("weight", "bias")}
        trainable = partly_trained(base, seed, chosen)
        save_whole, sizes = trainable.save, found.wider(width)

        def save(folder: Path) -> None:
            with _merged(model, layers, sizes):
                save_whole(folder)

        def load(folder: Path) -> None:
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            for key, size in sizes.items():
                if getattr(saved.config, key) != size:
                    raise RunError(
                        f"{folder}: has {key} = {getattr(saved.config, key)}; with method.width = {width} "
                        f"it must be {size}"
                    )
            weights = saved.state_dict()
            with torch.no_grad():
                for name, layer in layers.items():
                    layer.split(weights[f"{name}.weight"], weights.get(f"{name}.bias"))
                for name in trainable.head:
                    trainable.parameters[name].copy_(weights[name])

        trainable.save, trainable.load = save, load
        return trainable


@contextlib.contextmanager
def _merged(model: Any, layers: Mapping[str, Widened], sizes: Mapping[str, int]) -> Iterator[None]:
    """For the time of the context, the model is a plain one with wider feed-forward networks."""
    before = {key: getattr(model.config, key) for key in sizes}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer.merged())
        for key, size in sizes.items():
            setattr(model.config, key, size)
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        for key, size in before.items():
            setattr(model.config, key, size)
