"""Ten short conversations, and a tiny Llama that can learn them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.chat import chat_tokenizer
from helpers.rows import write_jsonl

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant", "pig", "rat")

SYSTEM = "system You are a helpful AI assistant named SmolLM, trained by Hugging Face user assistant"


def conversations() -> list[dict[str, Any]]:
    """Rows with ``messages``; every second one has two exchanges."""
    rows = []
    for number, animal in enumerate(ANIMALS):
        turns = [f"Who is the {animal}?", f"The {animal} has number {number}."]
        if number % 2:
            turns += ["And its friend?", f"That is the {ANIMALS[(number + 3) % len(ANIMALS)]}."]
        roles = ("user", "assistant")
        rows.append({"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]})
    return rows


def chat_llama(folder: Path, name: str = "smollm2", *, padded_by_end: bool = True) -> str:
    """A tiny Llama with the chat template of that name; its end-of-turn token is its padding, too."""
    import transformers

    texts = [message["content"] for row in conversations() for message in row["messages"]]
    tokenizer = chat_tokenizer(name, padded_by_end=padded_by_end, texts=[*texts, SYSTEM])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, max_position_embeddings=256,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=1,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():  # transformers leaves the padding token's vector at 0, and no model could write it
        model.get_input_embeddings().weight.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def taught_llama(folder: Path, steps: int = 100) -> str:
    """The same model after full-batch training on the conversations, so that it repeats their answers."""
    import transformers

    chat_llama(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations()]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        labels = ids.masked_fill(mask == 0, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval().save_pretrained(folder)
    return str(folder)


def chat_recipe(folder: Path, base: str, **data: Any) -> dict[str, Any]:
    """A recipe on the conversations, which are written to ``folder``; all of them are tested."""
    write_jsonl(folder / "train.jsonl", conversations())
    given = {"task": "chat", "development": "train", "test": "train", "max_length": 200, **data}
    return {
        "model": {"base": base},
        "data": {"source": str(folder / "train.jsonl"), "max_target_length": 40, **given},
        "clients": {"partition": "iid", "count": 2, "test_fraction": 0.0, "development_fraction": 0.0},
        "method": {"name": "lora", "rank": 4},
        "training": {"batch_size": 5, "local_steps": 2},
        "rounds": {"count": 2},
        "evaluation": {"max_new_tokens": 8},
    }
