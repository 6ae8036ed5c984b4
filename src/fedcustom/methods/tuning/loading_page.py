"""Loading page: the README of an exported folder, with code that loads it without this package."""

from __future__ import annotations

import json

from ...models.configuration import HUB_NAMES
from ...models.load import Base
from ...models.pooled_classifier import FILE, PooledClassifier

CARD = "# A customised {name}\n\nLoad it, in this folder, with the ecosystem's own tools:\n\n"
"""How a page begins that shows how to load a model."""

FENCE = "```"

INPUTS = 'inputs = tokenizer("a text", return_tensors="pt", return_token_type_ids=False)\n'
"""The line after which the model, which is loaded before it, is used."""

MESSAGES = 'messages = [{"role": "user", "content": "a text"}]\n'
"""The same where the model answers in conversations."""


def loading_code(page: str) -> str:
    """The part of a page's code that loads ``model`` and ``tokenizer``; empty where it has none."""
    _, _, code = page.partition(f"{FENCE}python\n")
    for line in (INPUTS, MESSAGES):
        load, found, _ = code.partition(line)
        if found:
            return load
    return ""


def auto_class(base: Base) -> str:
    """The name of the class of ``transformers`` that loads a model for the task."""
    if base.task.kind == "classification":
        return "AutoModelForSequenceClassification"
    if base.task.kind == "retrieval":
        return "AutoModel"
    return "AutoModelForSeq2SeqLM" if base.sequence_to_sequence else "AutoModelForCausalLM"


def loading_page(base: Base, *, adapter: bool, code: str = "") -> str:
    """How to load what was saved, without this package. ``code`` is the file with code of its own, beside the
    page, without which the model cannot be loaded.
    """
    name = HUB_NAMES.get(base.name, base.path)
    named, options = json.dumps(name, ensure_ascii=False), _options(base, adapter=adapter)
    if isinstance(base.model, PooledClassifier):
        return _pooled_page(base, name, named + options, adapter=adapter, code=code)
    loader, inputs = auto_class(base), INPUTS
    if code and "trust_remote_code" not in options:
        options += ", trust_remote_code=True"
    if base.task.kind == "classification":
        labels = list(base.task.labels)
        extra = f",\n    num_labels={len(labels)}, id2label=dict(enumerate(labels))"
        head = f"labels = {labels!r}\n"
        use = "print(labels[model(**inputs).logits.argmax(-1).item()])"
    elif base.task.kind == "retrieval":
        extra, head = "", ""
        use = (
            "states, mask = model(**inputs).last_hidden_state, inputs['attention_mask'].unsqueeze(-1)\n"
            "mean = (states * mask).sum(1) / mask.sum(1)\nprint(mean / mean.norm())"
        )
    elif base.task.chat:
        extra = head = ""
        inputs = MESSAGES
        if base.task.system is not None:
            inputs += f'messages.insert(0, {{"role": "system", "content": {base.task.system!r}}})\n'
        use = (
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
            f"output = model.generate(**inputs, max_new_tokens=64, eos_token_id={base.stops})[0]\n"
            'print(tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
        )
    else:
        extra = head = ""
        use = (
            "output = model.generate(**inputs, max_new_tokens=64)[0]\n"
            "print(tokenizer.decode(output, skip_special_tokens=True))"
        )
    if adapter:
        load = (
            f"{head}base = {loader}.from_pretrained({named}{options}{extra})\n"
            'model = PeftModel.from_pretrained(base, ".").eval()\n'
        )
        imports = f"from peft import PeftModel\nfrom transformers import {loader}, AutoTokenizer\n"
    else:
        note = _trusts(code) if code else ""
        load = f'{head}{note}model = {loader}.from_pretrained("."{options}).eval()\n'
        imports = f"from transformers import {loader}, AutoTokenizer\n"
    return (
        f"{CARD.format(name=name)}{FENCE}python\n{imports}\n{load}"
        f'tokenizer = AutoTokenizer.from_pretrained("."{", trust_remote_code=True" if code else ""})\n'
        f"{inputs}{use}\n{FENCE}\n{_rounded(base)}"
    )


def _rounded(base: Base) -> str:
    """What is said of a base that was quantised in training."""
    if base.quantised is None:
        return ""
    return (
        f"\nThe base model's matrices were stored in {base.quantised.name} while this was trained. Here they "
        "are exact, so outputs differ somewhat from those in training.\n"
    )


def _trusts(*files: str) -> str:
    return f"# trust_remote_code: transformers reads {' and '.join(files)}, beside this page\n"


def _pooled_page(base: Base, name: str, source: str, *, adapter: bool, code: str) -> str:
    """How to load a classifier of pooled states, whose code stands beside the page. ``source`` is the base
    model with options, as arguments.
    """
    labels, config = list(base.task.labels), base.model.config
    module = FILE.removesuffix(".py")
    if adapter:
        imports = "from peft import PeftModel\nfrom transformers import AutoTokenizer\n"
        imports += f"from {module} import PooledClassifier  # the file beside this page\n"
        pooling = f"pooling={config.pooling!r}, normalize={config.normalize}"
        pooling += f", skip={config.skip}" if config.skip else ""
        load = (
            f"base = PooledClassifier.from_encoder({source}, labels=labels, {pooling})\n"
            'model = PeftModel.from_pretrained(base, ".").eval()\n'
        )
    else:
        imports = "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        load = _trusts(FILE, *([code] if code else [])) + (
            'model = AutoModelForSequenceClassification.from_pretrained(".", trust_remote_code=True).eval()\n'
        )
    trust = "" if adapter else ", trust_remote_code=True"
    return (
        f"{CARD.format(name=name)}{FENCE}python\n{imports}\nlabels = {labels!r}\n{load}"
        f'tokenizer = AutoTokenizer.from_pretrained("."{trust})\n'
        f"{INPUTS}print(labels[model(**inputs).logits.argmax(-1).item()])\n{FENCE}\n{_rounded(base)}"
    )


def _options(base: Base, *, adapter: bool) -> str:
    """The further arguments of ``from_pretrained`` without which other numbers, or none, would be loaded."""
    options: dict[str, str] = {}
    if type(base.model).__module__.startswith("transformers_modules"):
        options["trust_remote_code"] = "True"
    if adapter:
        options["dtype"] = '"float32"'  # in which adapters are trained, whatever the checkpoint is stored in
        if base.revision is not None:
            options["revision"] = json.dumps(base.revision)
        if base.loading.mismatched:
            options["ignore_mismatched_sizes"] = "True"
        if base.architecture == "decoder" and base.task.kind == "classification":
            # It reads the last token that is no padding; many decoders' configurations name none.
            options["pad_token_id"] = str(base.model.config.pad_token_id)
    return "".join(f", {key}={value}" for key, value in options.items())
