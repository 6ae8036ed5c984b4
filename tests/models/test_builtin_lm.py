"""The language models that ship with the package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcustom.models.configuration import builtin_models

NAMES = ("builtin:lm", "builtin:lm-small")

COUNTS = Path(__file__).parent / "token_counts.json"
"""How often each token stands in the models' training tokens: ``numpy.bincount`` of the ``train.npy`` that
``scripts/pretrain_lm.py`` prepares.
"""

PARAGRAPH = (
    "The road went down between the hills until it came to a small town by the sea. It was late in the "
    "afternoon, and the people were coming home from their work. An old man sat before the door of his house "
    "and looked at the ships in the harbour. He had been a sailor in his youth, and told the children many "
    "stories of the places he had seen. They did not believe all of them, but they loved to hear him speak. "
    "When the lamps were lit and the night came on, their mothers called them, and they ran away laughing "
    "through the narrow streets."
)


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    folder = builtin_models()[request.param]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def greedy(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=24,
        min_new_tokens=24, pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    return [list(row) for row in output[:, inputs.input_ids.shape[1] :].tolist()]


def test_both_are_small_and_of_the_standard_kind() -> None:
    folders = [builtin_models()[name] for name in NAMES]
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    assert size <= 30e6
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["tie_word_embeddings"]
        assert (config["vocab_size"], config["max_position_embeddings"]) == (8192, 512)
        assert config["pad_token_id"] not in (None, config["eos_token_id"])
        card = (folder / "README.md").read_text()
        assert all(word in card for word in ("bits per byte", "tokens seen", "Limits", "Reproduce"))


def test_the_small_one_has_at_most_two_million_parameters() -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin_models()["builtin:lm-small"])
    assert sum(p.numel() for p in model.parameters()) <= 2_000_000


def test_greedy_decoding_is_stable(loaded: tuple[Any, Any]) -> None:
    """The same words again, without a cache, and padded in a batch."""
    model, tokenizer = loaded
    prompt = "The old house stood"
    (first,) = greedy(model, tokenizer, [prompt])
    assert greedy(model, tokenizer, [prompt]) == [first]
    assert greedy(model, tokenizer, [prompt], use_cache=False) == [first]
    assert (
        greedy(model, tokenizer, [prompt, "In the morning, when the sun had risen, the doctor"])[0] == first
    )
    ids = tokenizer(prompt).input_ids
    for token in first:  # by hand: the likeliest token of one pass after the other
        assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_a_paragraph_costs_less_than_with_a_unigram_model(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    counts = json.loads(COUNTS.read_text())
    total = sum(counts) + len(counts)
    unigram = -sum(math.log((counts[i] + 1) / total) for i in ids[0, 1:].tolist()) / (ids.shape[1] - 1)
    assert loss < unigram - 1.0  # nats a token


def test_text_survives_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for text in (PARAGRAPH, "  two  spaces\nand a line", "naïve café – 日本", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
