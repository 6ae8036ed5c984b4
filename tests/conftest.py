"""Tiny models, a tiny data set and small recipes that every test can use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more; also for child processes

import numpy as np
import pytest
import torch

TOPICS = {
    "animal": ["cat", "dog", "horse", "bird", "mouse", "fish"],
    "food": ["bread", "soup", "apple", "rice", "cake", "milk"],
    "place": ["house", "street", "garden", "school", "river", "hill"],
}
FILLERS = ["the", "a", "old", "small", "near", "with", "sees", "likes", "and", "then"]


def make_rows(count: int, seed: int, *, sites: int = 4) -> list[dict[str, Any]]:
    """Rows with fields for classification and for generation; the topic's words give the label away."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = list(TOPICS)[generator.integers(3)]
        words = [
            *generator.choice(FILLERS, 3),
            generator.choice(TOPICS[label]),
            *generator.choice(FILLERS, 2),
        ]
        thing = generator.choice(TOPICS[label])
        rows.append(
            {
                "text": " ".join(words),
                "label": label,
                "site": f"site-{number % sites}",
                "source": f"kind {label} thing {thing}",
                "target": f"the {thing} is a {label}",
                "references": [f"the {thing} is a {label}", f"a {label} named {thing}"],
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", make_rows(160, 0))
    write_jsonl(folder / "development.jsonl", make_rows(24, 1))
    write_jsonl(folder / "test.jsonl", make_rows(40, 2))
    return folder


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{row['text']} {row['source']} {row['target']}" for row in make_rows(400, 9)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64,
    )  # fmt: skip


def tiny_model(kind: str) -> Any:
    """A randomly initialised model of a few thousand weights."""
    import transformers as t

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        return t.BertModel(
            t.BertConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
            )
        )  # fmt: skip
    if kind == "llama":
        return t.LlamaForCausalLM(
            t.LlamaConfig(
                vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
                tie_word_embeddings=True, **special,
            )
        )  # fmt: skip
    if kind == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)
        )
    if kind == "bart":
        return t.BartForConditionalGeneration(
            t.BartConfig(
                vocab_size=400, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
                decoder_start_token_id=2, forced_eos_token_id=None, **special,
            )
        )  # fmt: skip
    raise ValueError(kind)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models: bert, llama (grouped-query attention), gpt2 (Conv1D layers), bart."""
    folders = {}
    tokenizer = tiny_tokenizer()
    for kind in ("bert", "llama", "gpt2", "bart"):
        folder = tmp_path_factory.mktemp("models") / kind
        torch.manual_seed(11)
        tiny_model(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def sentence_files(folder: Path, pooling: Any, *, normalize: bool) -> Path:
    """Make an encoder's folder a sentence-transformers one; ``pooling`` is its configuration of that, or the
    text of one.
    """
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalize else {})
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in list(kinds)[1:]:
        (folder / path).mkdir()
    said = pooling if isinstance(pooling, str) else json.dumps({"word_embedding_dimension": 32, **pooling})
    (folder / "1_Pooling" / "config.json").write_text(said)
    return folder


@pytest.fixture(scope="session")
def sentence(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny BERT as a sentence-transformers folder: mean pooling, length 1."""
    folder = shutil.copytree(tiny["bert"], tmp_path_factory.mktemp("models") / "sentence")
    return str(sentence_files(folder, {"pooling_mode_mean_tokens": True}, normalize=True))


@pytest.fixture
def small(tiny: dict[str, str], data_folder: Path) -> dict[str, Any]:
    """A recipe that runs in about a second: tiny encoder, four natural clients, two rounds."""
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(data_folder), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "site"},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8},
        "rounds": {"count": 2},
        "evaluation": {"batch_size": 32},
    }


@pytest.fixture
def generation(tiny: dict[str, str], data_folder: Path) -> dict[str, Any]:
    """The same for a tiny decoder that generates."""
    return {
        "model": {"base": tiny["llama"]},
        "data": {
            "source": str(data_folder), "task": "generation", "test": "test", "development": "development",
            "prompt": "{source} :", "target": " {target}", "references": "references",
            "max_length": 24, "max_target_length": 16,
        },
        "clients": {"partition": "iid", "count": 3},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8},
        "rounds": {"count": 2, "clients_per_round": 2},
        "evaluation": {"max_new_tokens": 8},
    }  # fmt: skip
