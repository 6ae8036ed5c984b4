"""The same work for every engine: a job is a folder with a base model, an adapter to start from, and the
token ids of every batch that a client sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedcustom.core.seeds import name_seed
from fedcustom.data.build import build_data
from fedcustom.data.tokens import TokenizedExample, example_order
from fedcustom.federated.build import make_method
from fedcustom.federated.resolve import resolved
from fedcustom.federated.schedule import plan_rounds
from fedcustom.methods.messages import Work
from fedcustom.methods.tuning.local_training import batch_ranges
from fedcustom.methods.tuning.method import WeightTuning
from fedcustom.models.load import load_base
from fedcustom.recipe.overrides import merged
from fedcustom.recipe.recipe import Recipe, parse_recipe, to_toml


def write_job(recipe: Mapping[str, Any], folder: Path, *, development: str | None = None) -> Path:
    """Write the job that a recipe asks for. Our own engine runs the recipe, the others the batches that it
    leads to. ``development`` names a split of the recipe's data on which all final adapters are evaluated
    after the runs.
    """
    # Others know no remedies for label skew, which classifiers have by default.
    plain = merged({"training": {"logit_adjustment": 0.0}}, recipe)
    checked = resolved(parse_recipe(plain, "benchmark"))
    data = build_data(checked.data, checked.clients, checked.seed)
    base = load_base(checked.model, data.task, checked.seed)
    folder.mkdir(parents=True)
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    method = make_method(checked, base, data)
    assert isinstance(method, WeightTuning)
    method.export(method.initialise(), folder / "start")
    local = checked.model_copy(
        update={"model": checked.model.model_copy(update={"base": str(folder / "model")})}
    )
    (folder / "recipe.toml").write_text(to_toml(local), encoding="utf-8")
    tokens = {name: method.tokens(client.train) for name, client in data.clients.items()}
    content = _work(
        checked, tokens, [{n: a.amount for n, a in r.items()} for r in plan_rounds(checked, data)]
    )
    content |= {
        "task": data.task.kind,
        "padding": base.tokenizer.pad_token_id,
        "precision": base.precision,
        "clients": list(data.clients),
    }
    if development is not None:
        scored = checked.data.model_copy(update={"development": development})
        rows = build_data(scored, checked.clients, checked.seed).development
        content["development"] = _plain(method.tokens(rows), checked)
    (folder / "work.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _work(
    recipe: Recipe, tokens: Mapping[str, list[TokenizedExample]], plan: list[dict[str, Work]]
) -> dict[str, Any]:
    """Every client's batches of every round, in the order in which our engine makes them."""
    training = recipe.training
    if (training.optimizer, training.schedule, training.weight_decay) != ("adamw", "constant", 0.0):
        raise ValueError("a job that others can do has AdamW at a constant rate, and no weight decay")
    offsets = dict(zip(tokens, np.cumsum([0, *map(len, tokens.values())]).tolist(), strict=False))
    seen = dict.fromkeys(tokens, 0)
    rounds = []
    for cohort in plan:
        told: dict[str, Any] = {}
        for name, amount in cohort.items():
            count, start = len(tokens[name]), seen[name]
            ranges = batch_ranges(count, start, training.batch_size, amount)
            seen[name] = ranges[-1][1]
            order = example_order(count, start, seen[name], [recipe.seed, 5, name_seed(name)])
            batches = [[offsets[name] + i for i in order[a - start : b - start]] for a, b in ranges]
            told[name] = {"weight": count, "batches": batches}
        rounds.append(told)
    return {
        "learning_rate": training.learning_rate,
        "clip_norm": training.clip_norm,
        "rounds": rounds,
        **_plain([example for examples in tokens.values() for example in examples], recipe),
    }


def _plain(examples: Sequence[TokenizedExample], recipe: Recipe) -> dict[str, list[Any]]:
    """Token ids, and classes or how many of the first tokens are no targets."""
    classes = recipe.data.task == "classification"
    return {
        "examples": [np.concatenate([e.source, e.target]).tolist() for e in examples],
        "labels": [e.label if classes else len(e.source) for e in examples],
    }


PORTION = 2**16
"""Rows of random texts that are drawn together."""


def write_random_gpt2(folder: Path, *, vocabulary: int, layers: int, width: int, heads: int) -> Path:
    """A GPT-2 with random weights and a tokenizer whose words are ``w0``, ``w1`` and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocabulary - 1)} | {"<end>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=128, n_embd=width, n_layer=layers, n_head=heads,
        bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    return folder


def write_random_texts(file: Path, *, rows: int, tokens: int, vocabulary: int, owners: int = 0) -> Path:
    """Rows of ``source`` and ``target`` that make ``tokens`` tokens together, the closing one included; each
    of one of ``owners``, the first rows of each once, where there are any.
    """
    generator = np.random.default_rng(0)
    # Drawn from few words, so that there is something to learn.
    chances = 1 / np.arange(1, vocabulary)
    with file.open("w", encoding="utf-8") as out:
        for start in range(0, rows, PORTION):
            size = (min(PORTION, rows - start), tokens - 1)
            drawn = generator.choice(vocabulary - 1, size=size, p=chances / chances.sum())
            for place, row in enumerate(drawn.tolist(), start=start):
                line = {"source": f"w{row[0]}", "target": " ".join(f"w{word}" for word in row[1:])}
                if owners:
                    whose = place if place < owners else int(generator.integers(owners))
                    line["owner"] = f"owner-{whose}"
                out.write(json.dumps(line) + "\n")
    return file
