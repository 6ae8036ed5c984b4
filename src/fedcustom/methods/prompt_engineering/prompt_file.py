"""Prompt export: JSON and text for any chat or completion interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.errors import RunError
from ...core.files import read_json, write_json
from ...models.configuration import HUB_NAMES
from ...models.load import Base
from ..tuning.model_card import offline

FILE = "prompt.json"


def prompt_notes(content: dict[str, Any]) -> dict[str, str]:
    """The texts beside a run's summary: ``prompt.json``, and ``prompt.txt`` with its messages alone."""
    messages = content.get("messages", [])
    lines = "\n\n".join(message["content"] for message in messages) if messages else described(content)
    return {FILE: json.dumps(content, indent=1, ensure_ascii=False) + "\n", "prompt.txt": lines + "\n"}


def described(content: dict[str, Any]) -> str:
    """An encoder's label descriptions, one a line."""
    return "\n".join(f"{label}: {text}" for label, text in content["descriptions"].items())


def write_prompt(base: Base, content: dict[str, Any], folder: Path) -> None:
    """Write the prompt with the tokenizer and a page that shows how to use both; the model is the base
    model.
    """
    write_json(folder / FILE, content)
    base.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_page(base, content), encoding="utf-8")


def read_prompt(folder: Path, strategy: str) -> dict[str, Any]:
    """What :func:`write_prompt` wrote.

    Raises:
        RunError: the file is missing or damaged, or of another strategy.
    """
    content = read_json(folder / FILE)
    if not isinstance(content, dict) or content.get("strategy") != strategy:
        raise RunError(f"{folder / FILE}: is not a prompt of strategy {strategy!r}")
    return content


def _page(base: Base, content: dict[str, Any]) -> str:
    name = HUB_NAMES.get(base.name, base.path)
    if "descriptions" in content:
        code = _ENCODER
    elif base.chat is not None:
        code = _CHAT.replace("STOPS", repr(base.stops))
    elif base.task.kind == "generation":
        code = _GENERATOR.replace(_WRITTEN, _STOPPED) if content.get("stop") else _GENERATOR
    else:
        code = _CLASSIFIER
    loader = "AutoModelForSeq2SeqLM" if base.architecture == "encoder-decoder" else "AutoModelForCausalLM"
    rows = len(content.get("shots", []))
    shown = f"The prompt holds {rows} training row{'s'[rows == 1 :]}, word for word. " if rows else ""
    code = code.replace("MODEL", name).replace("LOADER", loader)
    card = (
        f"# A prompt for {name}\n\nThe model's weights are unchanged. `prompt.json` holds the prompt, for "
        "any chat or completion interface:\nput the text in the place of `{input}` in `messages`. "
        f"{shown}With transformers, in this folder:\n\n```python\n{code}```\n"
    )
    return offline(card, base)


_ENCODER = """import json
import torch
from transformers import AutoModel, AutoTokenizer

prompt = json.load(open("prompt.json", encoding="utf-8"))
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained("MODEL").eval()


def embed(texts):
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


labels, texts = zip(*prompt["descriptions"].items())
scores = embed(["a text"]) @ embed(list(texts)).T
if prompt["calibrated"]:
    scores = scores - embed([prompt["content_free"]]) @ embed(list(texts)).T
print(labels[scores.argmax().item()])
"""

_CLASSIFIER = """import json
import torch
from transformers import AutoTokenizer, LOADER

prompt = json.load(open("prompt.json", encoding="utf-8"))
tokenizer, model = AutoTokenizer.from_pretrained("."), LOADER.from_pretrained("MODEL").eval()
asked = "\\n\\n".join(message["content"] for message in prompt["messages"])


def score(text, label):
    before = tokenizer(asked.replace("{input}", text))["input_ids"]
    if model.config.is_encoder_decoder:
        after = tokenizer(label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        inputs = {"input_ids": torch.tensor([before]), "labels": torch.tensor([after])}
    else:
        before = before[:-1] if before[-1] == tokenizer.eos_token_id else before
        space = "" if asked[-1:].isspace() else " "
        after = tokenizer(space + label, add_special_tokens=False)["input_ids"]
        inputs = {"input_ids": torch.tensor([before + after])}
    with torch.no_grad():
        odds = model(**inputs).logits[0].log_softmax(-1)
    start = 0 if model.config.is_encoder_decoder else len(before) - 1
    return sum(odds[start + place, token].item() for place, token in enumerate(after))


def calibrated(text, label):
    return score(text, label) - (score(prompt["content_free"], label) if prompt["calibrated"] else 0)


labels = prompt["labels"]
print(max(labels, key=lambda label: calibrated("a text", labels[label])))
"""

_CHAT = """import json
from transformers import AutoTokenizer, LOADER

prompt = json.load(open("prompt.json", encoding="utf-8"))
tokenizer, model = AutoTokenizer.from_pretrained("."), LOADER.from_pretrained("MODEL").eval()
*messages, asked = prompt["messages"]
messages += [{**asked, "content": asked["content"].replace("{input}", "a text")}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=STOPS)[0]
print(tokenizer.decode(output[inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

_GENERATOR = """import json
from transformers import AutoTokenizer, LOADER

prompt = json.load(open("prompt.json", encoding="utf-8"))
tokenizer, model = AutoTokenizer.from_pretrained("."), LOADER.from_pretrained("MODEL").eval()
asked = "\\n\\n".join(message["content"] for message in prompt["messages"]).replace("{input}", "a text")
inputs = tokenizer(asked, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=64)[0]
print(tokenizer.decode(output, skip_special_tokens=True))
"""

_WRITTEN = """print(tokenizer.decode(output, skip_special_tokens=True))
"""
_STOPPED = """written = output if model.config.is_encoder_decoder else output[inputs["input_ids"].shape[1] :]
said = tokenizer.decode(written, skip_special_tokens=True).strip()
print(said.partition(prompt["stop"][0])[0])  # another example would follow
"""
