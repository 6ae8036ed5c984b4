"""Kinds of models by architecture and size, for default learning rates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from ..core.errors import ModelError

Architecture = Literal["encoder", "decoder", "encoder-decoder"]

ModelKind = Literal["encoder", "decoder", "large"]

SMALL = 50e6
"""Parameters up to which a model is small."""


class Rates(NamedTuple):
    """Learning rates by kind of model: small encoders, small models that decode, and all that are larger."""

    encoder: float
    decoder: float
    large: float

    def of(self, kind: ModelKind) -> float:
        """The rate for a kind of model."""
        return float(getattr(self, kind))


def architecture_of(configuration: Any) -> Architecture:
    """Encoder, decoder or encoder-decoder, read off a configuration.

    Raises:
        ModelError: ``transformers`` knows the type neither as an encoder nor as a language model.
    """
    from transformers.models.auto import modeling_auto as auto

    if getattr(configuration, "is_encoder_decoder", False):
        return "encoder-decoder"
    kind = configuration.model_type
    names = " ".join(configuration.architectures or ())
    if "CausalLM" in names or "LMHead" in names:
        return "decoder"
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise ModelError(f"model.base: a {kind!r} model is neither an encoder nor a language model of text")


def kind_of(configuration: Any) -> ModelKind:
    """The kind of a model with this configuration, by its parameters as :func:`rough_parameters` counts them;
    one that cannot be counted is large.
    """
    count = rough_parameters(configuration)
    if count is None or count > SMALL:
        return "large"
    return "encoder" if architecture_of(configuration) == "encoder" else "decoder"


def rough_parameters(configuration: Any) -> int | None:
    """About how many parameters a transformer has: those of its tokens' embeddings, and of each layer
    attention's four matrices and the feed-forward network's two; None where the configuration does not say.
    """
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    vocabulary, width, layers = (getattr(configuration, name, None) for name in names)
    if not (isinstance(vocabulary, int) and isinstance(width, int) and isinstance(layers, int)):
        return None
    inner = getattr(configuration, "intermediate_size", None) or getattr(configuration, "d_ff", None)
    inner = inner if isinstance(inner, int) else 4 * width
    if getattr(configuration, "is_encoder_decoder", False):
        deeper = (getattr(configuration, name, None) for name in ("num_decoder_layers", "decoder_layers"))
        layers += next((number for number in deeper if isinstance(number, int)), layers)
    return vocabulary * width + layers * (4 * width * width + 2 * width * inner)
