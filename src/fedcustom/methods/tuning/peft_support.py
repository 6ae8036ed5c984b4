"""Support for methods built on ``peft``: wrapping, names, the head and saving."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...core.errors import ModelError, RunError
from ...models.frozen_layers import in_upper_layers
from ...models.load import HUB_NAMES, Base
from ...models.pooled_classifier import FILE, PooledClassifier, copy_code
from .model_card import offline
from .technique import TrainableModel

CARD = "# A customised {name}\n\nLoad it, in this folder, with the ecosystem's own tools:\n\n"
"""How a page begins that shows how to load a model."""


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

    if isinstance(config, peft.PromptLearningConfig) and config.token_dim is None:
        # PEFT knows these by the names that most configurations have for them, and this one may not.
        config.token_dim = base.model.get_input_embeddings().weight.shape[1]
        config.num_layers = config.num_layers or 1
        config.num_attention_heads = config.num_attention_heads or 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base.model, config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"method {method} does not fit {base.name}: {str(error).splitlines()[0]}") from error
    # The configuration that is saved must name a model that others can load.
    config.base_model_name_or_path = HUB_NAMES.get(base.name, base.path)
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
    if isinstance(base.model, PooledClassifier):
        copy_code(folder)
    card = offline(loading_page(base, adapter=True), base)
    (folder / "README.md").write_text(card, encoding="utf-8")


def loading_page(base: Base, *, adapter: bool) -> str:
    """How to load what was saved, without this package."""
    name = HUB_NAMES.get(base.name, base.path)
    if isinstance(base.model, PooledClassifier):
        return _pooled_page(base, name, adapter=adapter)
    if base.task.kind == "classification":
        loader = "AutoModelForSequenceClassification"
        labels = list(base.task.labels)
        extra = f",\n    num_labels={len(labels)}, id2label=dict(enumerate(labels))"
        head = f"labels = {labels!r}\n"
        use = "print(labels[model(**inputs).logits.argmax(-1).item()])"
    elif base.task.kind == "retrieval":
        loader, extra, head = "AutoModel", "", ""
        use = (
            "states, mask = model(**inputs).last_hidden_state, inputs['attention_mask'].unsqueeze(-1)\n"
            "mean = (states * mask).sum(1) / mask.sum(1)\nprint(mean / mean.norm())"
        )
    else:
        loader = "AutoModelForSeq2SeqLM" if base.sequence_to_sequence else "AutoModelForCausalLM"
        extra = head = ""
        use = (
            "output = model.generate(**inputs, max_new_tokens=64)[0]\n"
            "print(tokenizer.decode(output, skip_special_tokens=True))"
        )
    if adapter:
        load = (
            f'{head}base = {loader}.from_pretrained("{name}"{extra})\n'
            'model = PeftModel.from_pretrained(base, ".").eval()\n'
        )
        imports = f"from peft import PeftModel\nfrom transformers import {loader}, AutoTokenizer\n"
    else:
        load = f'{head}model = {loader}.from_pretrained(".").eval()\n'
        imports = f"from transformers import {loader}, AutoTokenizer\n"
    return (
        f"{CARD.format(name=name)}```python\n{imports}\n{load}"
        f'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        f'inputs = tokenizer("a text", return_tensors="pt", return_token_type_ids=False)\n{use}\n```\n'
    )


def _pooled_page(base: Base, name: str, *, adapter: bool) -> str:
    """How to load a classifier of pooled states, whose code stands beside the page."""
    labels, config = list(base.task.labels), base.model.config
    module = FILE.removesuffix(".py")
    if adapter:
        imports = "from peft import PeftModel\nfrom transformers import AutoTokenizer\n"
        imports += f"from {module} import PooledClassifier  # the file beside this page\n"
        pooling = f"pooling={config.pooling!r}, normalize={config.normalize}"
        pooling += f", skip={config.skip}" if config.skip else ""
        load = (
            f'base = PooledClassifier.from_encoder("{name}", labels=labels, {pooling})\n'
            'model = PeftModel.from_pretrained(base, ".").eval()\n'
        )
    else:
        imports = "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        load = (
            f"# trust_remote_code: transformers reads {FILE}, beside this page\n"
            'model = AutoModelForSequenceClassification.from_pretrained(".", trust_remote_code=True).eval()\n'
        )
    trust = "" if adapter else ", trust_remote_code=True"
    return (
        f"{CARD.format(name=name)}```python\n{imports}\nlabels = {labels!r}\n{load}"
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})\n'
        'inputs = tokenizer("a text", return_tensors="pt", return_token_type_ids=False)\n'
        "print(labels[model(**inputs).logits.argmax(-1).item()])\n```\n"
    )


def leave_out_virtual_tokens(model: Any, length: int) -> None:
    """Have a classifier of pooled states pool those of the text alone, and not of tokens before it."""
    if isinstance(model, PooledClassifier):
        model.config.skip = length
