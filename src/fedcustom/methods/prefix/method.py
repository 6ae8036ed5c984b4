"""Prefix-tuning (Li and Liang 2021): learnt keys and values in front of those of the input, in every
layer.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...core.errors import ModelError, RecipeError
from ...models.load import Base
from ..tuning.peft_support import attach_peft, peft_parameters, task_type, tuned_with
from ..tuning.reparametrisation import Network, reparametrise
from ..tuning.technique import TrainableModel
from .aggregation_hooks import NAME, PrefixAggregation
from .distil import Distiller
from .init import cache_shape, text_prefix
from .memory import attach_memory
from .settings import PrefixSettings

PEFT_NAME = "prompt_encoder.embedding.weight"


class Prefix:
    """Federated prefix-tuning on the keys and values themselves.

    What travels: ``prefix`` of (layers, 2, key-value heads, length, head size), keys first, and the head. The
    network of the reparametrisation stays at the client: it is started anew in each round such that it
    changes nothing at first, and its output is added to the prefix before that is sent. So 2 x layers x heads
    x size x length numbers travel, where implementations that average the network send thirty times more.
    """

    def __init__(self, settings: PrefixSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Wrap the model with PEFT's prefix tuning.

        Raises:
            ModelError: the model does not take keys and values from outside.
        """
        from peft import PrefixTuningConfig

        settings = self.settings
        if settings.kind == "memory":
            return attach_memory(base, settings, seed)
        require_key_value_input(base)
        config = PrefixTuningConfig(
            task_type=task_type(base),
            num_virtual_tokens=settings.length,
            init_weights="zero" if settings.init == "zero" else None,
            modules_to_save=list(base.head) or None,
        )
        layers, heads, size = cache_shape(base)
        config.num_layers, config.num_attention_heads, config.token_dim = layers, heads, heads * size
        initial = (
            text_prefix(base, settings.init_text, settings.length)
            if settings.init in ("auto", "text")
            else None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = attach_peft(base, config, "prefix")
        assumed = config.num_attention_heads, config.token_dim
        if assumed != (heads, heads * size):
            raise ModelError(
                f"method prefix does not fit {base.name}: its layers have {heads} key-value heads of "
                f"{heads * size} values in all, where PEFT assumes {assumed[0]} of {assumed[1]}; use method "
                "soft_prompt or lora"
            )
        layout = Layout(config)
        encoder = model.prompt_encoder["default"]
        if initial is not None:
            with torch.no_grad():
                encoder.embedding.weight.copy_(layout.to_peft(initial))
        parameters = peft_parameters(model)
        weight = parameters.pop(PEFT_NAME)
        trainable = tuned_with(base, model, parameters)
        trainable.base_model = base.model
        if settings.reparametrise:
            reparametrise(
                trainable,
                model,
                NAME,
                Network("mlp", settings.reparametrise_width, seed),
                to_travel=layout.from_peft,
                from_travel=layout.to_peft,
            )
        else:
            parameters[NAME] = weight
            trainable.matrices = {NAME: 2 * layout.layers}
            trainable.read_hook = lambda tensors: {**tensors, NAME: layout.from_peft(tensors[NAME])}
            trainable.write_hook = lambda tensors: {**tensors, NAME: layout.to_peft(tensors[NAME])}
        if settings.layers_sent is not None and settings.layers_sent > layers:
            raise RecipeError(f"method.layers_sent = {settings.layers_sent}: {base.name} has {layers} layers")
        distil = None
        if settings.public_text is not None:
            distil = partial(Distiller, base, settings, settings.public_text)
        if settings.merging != "mean" or settings.layers_sent is not None:
            trainable.hooks = PrefixAggregation(settings, distil)
        return trainable


class Layout:
    """Between PEFT's flat (length, 2 layers heads size) and our (layers, 2, heads, length, size)."""

    def __init__(self, config: Any) -> None:
        self.length: int = config.num_virtual_tokens
        self.layers: int = config.num_layers
        self.heads: int = config.num_attention_heads
        self.size: int = config.token_dim // config.num_attention_heads

    def from_peft(self, weight: Tensor) -> Tensor:
        """(length, 2 layers heads size) to (layers, 2, heads, length, size)."""
        return (
            weight.view(self.length, self.layers, 2, self.heads, self.size)
            .permute(1, 2, 3, 0, 4)
            .contiguous()
        )

    def to_peft(self, prefix: Tensor) -> Tensor:
        """The inverse of :meth:`from_peft`."""
        return prefix.permute(3, 0, 1, 2, 4).reshape(self.length, -1).contiguous()


def require_key_value_input(base: Base) -> None:
    """Refuse models that take no keys and values from outside.

    Raises:
        ModelError: names the model and what can be used in place of a prefix.
    """
    body = getattr(base.model, base.model.base_model_prefix, base.model)
    takes = "past_key_values" in inspect.signature(body.forward).parameters
    if not takes or (base.architecture == "encoder-decoder" and not base.sequence_to_sequence):
        # A classifier on an encoder-decoder takes no embedded input either.
        instead = "lora" if base.architecture == "encoder-decoder" else "soft_prompt or lora"
        raise ModelError(
            f"method prefix does not fit {base.name}: for this task its {base.model.config.model_type} code "
            f"takes no keys and values from outside; use method {instead}"
        )
