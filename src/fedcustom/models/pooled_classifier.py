"""A classifier of texts: an encoder, one vector of its last layer's states, and a linear layer.

This file stands alone (``torch`` and ``transformers``): a copy of it is saved beside customised models.
"""

# mypy: disable-error-code="no-untyped-call, override"
from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

FILE = "modeling_pooled_classifier.py"
"""What a copy of this file is called."""

POOLINGS = ("mean", "first", "max", "last", "pooler")
"""How states become one vector; pooler: the encoder's own pooling layer."""


class PooledClassifierConfig(PreTrainedConfig):
    """What is saved of a :class:`PooledClassifier`: the configuration of its encoder, how states are pooled,
    whether the vector is divided by its length, and how many states in front are left out (virtual tokens).
    """

    model_type = "pooled-classifier"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        pooling: str = "mean",
        normalize: bool = False,
        skip: int = 0,
        **other: Any,
    ) -> None:
        if other.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"a model of type {other['model_type']!r} is no {self.model_type!r}: load it with "
                "AutoModelForSequenceClassification and trust_remote_code=True"
            )
        self.encoder, self.pooling, self.normalize, self.skip = encoder or {}, pooling, normalize, skip
        super().__init__(**other)

    def encoder_config(self) -> Any:
        """The encoder's configuration, with the labels and how states are pooled."""
        config = AutoConfig.for_model(**self.encoder)
        config.id2label, config.label2id = self.id2label, self.label2id
        return with_pooling(config, self.pooling, normalize=self.normalize, skip=self.skip)


def with_pooling(config: Any, pooling: str, *, normalize: bool, skip: int = 0) -> Any:
    """An encoder's configuration that says how its states are pooled.

    Raises:
        ValueError: there is no such pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling {pooling!r}: allowed: {', '.join(POOLINGS)}")
    config.pooling, config.normalize, config.skip = pooling, normalize, skip
    return config


class PooledClassifier(PreTrainedModel):
    """Logits ``W v + b`` of the vector v that an encoder's last states are pooled to, without dropout.

    mean: the mean over tokens that are no padding (Reimers and Gurevych 2019); max: the largest of each
    number; first, last: one token's state. With ``normalize`` v has length 1. The first ``skip`` states are
    left out, so that virtual tokens count only through attention. In memory, ``config`` is the encoder's.
    """

    config_class = PooledClassifierConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        if isinstance(config, PooledClassifierConfig):
            config = config.encoder_config()
        kind = _class_of(config)
        for attention in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn"):
            setattr(self, attention, getattr(kind, attention, False))
        super().__init__(config)
        self.encoder = AutoModel.from_config(config, **_options(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        if config.pooling == "pooler" and getattr(self.encoder, "pooler", None) is None:
            raise ValueError(f"pooling 'pooler': a {config.model_type} model has no pooling layer")
        self.takes_cache = "past_key_values" in inspect.signature(self.encoder.forward).parameters
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | Path,
        labels: Sequence[str],
        *,
        pooling: str = "mean",
        normalize: bool = False,
        skip: int = 0,
        **options: Any,
    ) -> PooledClassifier:
        """A classifier of these labels on a pretrained encoder (a folder or a hub id), its linear layer drawn
        at random. ``options`` are those of ``from_pretrained`` (``revision``, ``dtype``).
        """
        chosen = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        config = AutoConfig.from_pretrained(encoder, **chosen)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        with_pooling(config, pooling, normalize=normalize, skip=skip)
        model: PooledClassifier = cls.from_pretrained(encoder, config=config, **options)
        return model

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """A classifier that was saved or, with the ``config`` of :func:`with_pooling`, one on an encoder,
        whatever head its checkpoint has.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder.
        """
        # A masked language model's checkpoint calls the encoder bert, roberta or model.
        called = getattr(_class_of(config), "base_model_prefix", "")
        if called:
            options["key_mapping"] = {rf"^{called}\.": "encoder.", **options.get("key_mapping", {})}
        wanted = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            name, *arguments, config=config, output_loading_info=True, **options
        )
        model, found = loaded
        if called:
            model._weight_conversions = None  # it is saved under its own names
        lacking = sorted(key for key in found["missing_keys"] if key.startswith("encoder."))
        if lacking:
            raise ValueError(f"no weights for {lacking[0].removeprefix('encoder.')} of the encoder")
        return (model, found) if wanted else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        **other: Any,
    ) -> SequenceClassifierOutput:
        """Logits of (texts, labels); with ``labels`` the mean cross-entropy too."""
        if past_key_values is not None and self.takes_cache:
            other["past_key_values"] = past_key_values
        other = {name: value for name, value in other.items() if value is not None}
        other.pop("return_dict", None)
        output = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **other
        )
        vector = self.pooled(output, attention_mask)
        logits = self.classifier(vector.to(self.classifier.weight.dtype))
        loss = functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def pooled(self, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """The vectors, (texts, width), in float32. A mask that is longer than the states, as with learnt keys
        and values in front, counts from its end.
        """
        config = self.config
        if config.pooling == "pooler":
            vector = output.pooler_output.float()
        else:
            states = output.last_hidden_state.float()
            if states.shape[1] > config.skip:  # else its last layer was computed for one token alone
                states = states[:, config.skip :]
            if config.pooling == "first":
                vector = states[:, 0]
            else:
                mask = states.new_ones(states.shape[:2])
                if attention_mask is not None:
                    mask = attention_mask[:, -states.shape[1] :].to(states.dtype)
                vector = _pool(states, mask.unsqueeze(-1), config.pooling)
        return functional.normalize(vector, dim=1) if config.normalize else vector

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        """Write the model so that ``AutoModelForSequenceClassification`` loads it with the copy of this file
        that is written beside it.
        """
        super().save_pretrained(save_directory, *arguments, **options)
        config = self.config
        encoder = config.to_dict()
        own = ("pooling", "normalize", "skip", "id2label", "label2id")
        for key in (*own, "architectures", "auto_map", "_name_or_path"):
            encoder.pop(key, None)
        kind, code = type(self), Path(inspect.getfile(type(self)))
        whole = self.config_class(
            encoder, config.pooling, config.normalize, config.skip,
            id2label=config.id2label, label2id=config.label2id,
            architectures=[kind.__name__], dtype=config.dtype,
        )  # fmt: skip
        module = FILE.removesuffix(".py") if kind is PooledClassifier else code.stem
        whole.auto_map = {
            "AutoConfig": f"{module}.{self.config_class.__name__}",
            "AutoModelForSequenceClassification": f"{module}.{kind.__name__}",
        }
        whole.save_pretrained(save_directory)
        copy_code(Path(save_directory))
        if kind is not PooledClassifier and code.parent.resolve() != Path(save_directory).resolve():
            shutil.copyfile(code, Path(save_directory) / code.name)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that no checkpoint has: those of the linear layer."""
        if module is self.classifier:
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)


def copy_code(folder: Path) -> None:
    """Put a copy of this file into a folder."""
    target = folder / FILE
    if not target.exists() or not target.samefile(__file__):
        shutil.copyfile(__file__, target)


def _class_of(config: Any) -> Any:
    """The encoder's class; None where ``transformers`` has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:  # code of its own
        return None
    kind: Any = MODEL_MAPPING[type(config)]
    return kind[0] if isinstance(kind, tuple) else kind


def _options(config: Any) -> dict[str, Any]:
    """Leave out a pooling layer that nobody reads."""
    kind = _class_of(config)
    takes = kind is not None and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": config.pooling == "pooler"} if takes else {}


def _pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """From states of (texts, tokens, width) and a mask of (texts, tokens, 1) to (texts, width)."""
    if pooling == "mean":
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    if pooling == "max":
        return states.masked_fill(mask == 0, -torch.inf).amax(dim=1)
    places = torch.arange(1, states.shape[1] + 1, device=states.device)
    last = (mask.squeeze(-1) * places).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]
