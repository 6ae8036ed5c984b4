"""Support for methods built on ``peft``: wrapping, names, the head and saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import ModelError, RunError
from ...models.configuration import HUB_NAMES
from ...models.frozen_layers import in_upper_layers
from ...models.load import Base
from ...models.pooled_classifier import PooledClassifier, copy_code
from .initialised_weights import add_initialised_weights
from .loading_page import loading_page
from .model_card import offline
from .technique import TrainableModel


def task_type(base: Base) -> str:
    """PEFT's name for the task."""
    if base.task.kind == "classification":
        return "SEQ_CLS"
    if base.task.kind == "retrieval":
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if base.sequence_to_sequence else "CAUSAL_LM"


def attach_peft(base: Base, config: Any, method: str) -> Any:
    """Wrap the base model; the adapter and the head are the only parameters that need gradients.

    Raises:
        ModelError: PEFT cannot apply the method to this model.
    """
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base.model, config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"method {method} does not fit {base.name}: {str(error).splitlines()[0]}") from error
    # The configuration that is saved must name a model that others can load.
    config.base_model_name_or_path = HUB_NAMES.get(base.name, base.path)
    config.revision = base.revision
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
    return model


def ending_in(model: nn.Module, ends: Iterable[str]) -> set[str]:
    """The names of the matrices that end in one of these, as PEFT matches them."""
    modules: Any = model.named_modules()
    names = (name for name, module in modules if isinstance(module, nn.Linear | Conv1D))
    return {name for name in names if name.endswith(tuple(ends))}


def upper(base: Base, names: Iterable[str], first: int, *, head_alone: bool = False) -> set[str]:
    """Those names of parameters or modules that belong to layers from ``first`` on; all if it is 0. With
    ``head_alone`` there may be none where the model has a head.

    Raises:
        ModelError: the model has no such layer, or nothing would be trained.
    """
    if not first:
        return set(names)
    try:
        found = in_upper_layers(base.model, set(names), first)
    except ValueError as error:
        raise ModelError(f"method.first_layer = {first} does not fit {base.name}: {error}") from None
    if not found and not (head_alone and base.head):
        raise ModelError(f"method.first_layer = {first}: leaves nothing of {base.name} to train")
    return found


def peft_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Parameters that need gradients, by their names in the base model's terms, in sorted order."""
    named = {clean_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def clean_name(name: str) -> str:
    """``base_model.model.bert...query.lora_A.default.weight`` becomes ``bert...query.lora_A.weight``."""
    for prefix in ("base_model.model.", "base_model."):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def head_names(base: Base, parameters: dict[str, nn.Parameter]) -> frozenset[str]:
    """The names of the classification head's parameters."""
    return frozenset(name for name in parameters if name.split(".")[0] in base.head)


def peft_tuned(base: Base, model: Any) -> TrainableModel:
    """A wrapped model whose trained parameters travel as they are."""
    parameters = peft_parameters(model)
    return tuned_with(base, model, parameters)


def tuned_with(base: Base, model: Any, parameters: dict[str, nn.Parameter]) -> TrainableModel:
    """A wrapped model with the parameters that are trained, under the names they travel by."""
    return TrainableModel(
        model,
        parameters,
        head_names(base, parameters),
        save=lambda folder: save_peft(base, model, folder),
        load=lambda folder: load_peft(model, folder),
    )


def load_peft(model: Any, folder: Path) -> None:
    """Put a saved adapter's weights into the wrapped model.

    Raises:
        RunError: the adapter has weights that the model has no place for.
    """
    import peft

    result: Any = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    # PEFT loads a prompt's vectors apart and still names them here.
    unexpected = [key for key in result.unexpected_keys if key != "prompt_embeddings"]
    if unexpected:
        raise RunError(f"{folder}: holds weights of another adapter: {unexpected[0]}")


def save_peft(base: Base, model: Any, folder: Path) -> None:
    """Write the adapter with its configuration, and a page that shows how to load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    add_initialised_weights(base, model, folder)
    if isinstance(base.model, PooledClassifier):
        copy_code(folder)
    card = offline(loading_page(base, adapter=True), base)
    (folder / "README.md").write_text(card, encoding="utf-8")


def leave_out_virtual_tokens(model: Any, length: int) -> None:
    """Have a classifier of pooled states pool those of the text alone, and not of tokens before it."""
    if isinstance(model, PooledClassifier):
        model.config.skip = length
