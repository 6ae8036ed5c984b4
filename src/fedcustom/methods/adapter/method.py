"""Bottleneck adapters (Houlsby et al. 2019) beside the feed-forward networks: the parallel adapter of
"Towards a Unified View of Parameter-Efficient Transfer Learning" (He et al. 2022, table 1).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...core.errors import ModelError
from ...models.load import Base
from ..tuning.feed_forward import find_feed_forward
from ..tuning.peft_support import upper
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained
from ..tuning.widening import Widening
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
    configuration says that its feed-forward networks are wider; those that ``first_layer`` leaves as they are
    have as many units more, of zeros.
    """

    def __init__(self, settings: AdapterSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Put extra hidden units beside those of every feed-forward network, or of the upper layers'.

        Raises:
            ModelError: the model has no feed-forward networks that can be widened by their configuration, or
                ``first_layer`` leaves none of them.
        """
        model, width = base.model, self.settings.width
        found = find_feed_forward(base)
        if found is None:
            raise ModelError(
                f"method adapter does not fit {base.name}: its {model.config.model_type} code has no "
                "feed-forward networks of plain matrices whose width is a setting; use method lora"
            )
        if first := self.settings.lowest:
            found = found.of(upper(base, (*found.inputs, *found.outputs), first))
        widening = Widening(model, found, width, seed)
        trainable = partly_trained(base, seed, widening.names())
        save_whole = trainable.save

        def save(folder: Path) -> None:
            with widening.merged():
                save_whole(folder)

        def load(folder: Path) -> None:
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            widening.take(saved, folder, "width")
            weights = saved.state_dict()
            with torch.no_grad():
                for name in trainable.head:
                    trainable.parameters[name].copy_(weights[name])

        trainable.save, trainable.load = save, load
        return trainable
