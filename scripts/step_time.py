"""Processor time of a training step, and bytes kept for its backward pass, of prefix memory, LoRA and
key-value pairs side by side, on MiniLM or on a decoder.

    python scripts/step_time.py --rows 32 --tokens 24
    python scripts/step_time.py --base builtin:lm --rows 8 --tokens 128

Steps are taken in turns, one thread, and the median counts; bytes are those of the tensors that autograd
saves, each storage once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from fedcustom.data.examples import LearningTask
from fedcustom.methods import registry
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "prefix memory": {"name": "prefix", "kind": "memory"},
    "  with query shifts": {"name": "prefix", "kind": "memory", "query_shifts": True},
    "  attention slots alone": {"name": "prefix", "kind": "memory", "feed_forward_slots": 0},
    "  feed-forward slots alone": {"name": "prefix", "kind": "memory", "slots": 0},
    "key-value pairs": {"name": "prefix", "kind": "kv"},
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Time of a training step, method by method.")
    parser.add_argument("--base", default="builtin:minilm", help="builtin:minilm, or a decoder")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    attached = {name: attach(settings, arguments.base) for name, settings in METHODS.items()}
    generator = torch.Generator().manual_seed(0)
    words = min(20_000, next(iter(attached.values())).model.config.vocab_size)
    ids = torch.randint(min(1000, words // 2), words, (arguments.rows, arguments.tokens), generator=generator)
    labels = torch.randint(0, 2, (arguments.rows,), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    kept = dict.fromkeys(METHODS, 0)
    for _ in range(arguments.steps + 2):
        for name, trainable in attached.items():
            begun = time.process_time()
            kept[name] = step(trainable, ids, labels)
            seconds[name].append(time.process_time() - begun)
    times = {name: statistics.median(some[2:]) for name, some in seconds.items()}
    print("                              CPU time   of LoRA's   kept for the backward pass   trained")
    for name, trainable in attached.items():
        count = sum(p.numel() for n, p in trainable.parameters.items() if n not in trainable.head)
        print(
            f"{name:<28} {1000 * times[name]:7.1f} ms {times[name] / times['lora']:8.2f} "
            f"{kept[name] / 1e6:20.1f} MB {count:18,}"
        )


def attach(settings: dict[str, Any], name: str) -> Any:
    """A method on a model of its own; encoders classify, decoders write."""
    classification = LearningTask("classification", ("a", "b"))
    task = classification if name == "builtin:minilm" else LearningTask("generation")
    base = load_base(ModelSettings(base=name), task, 0)
    registered = registry.methods()[settings["name"]]
    trainable = registered.load()(registry.settings_of(settings["name"])(**settings)).attach(base, 0)
    trainable.model.eval()
    return trainable


def step(trainable: Any, ids: Tensor, labels: Tensor) -> int:
    """A forward and a backward pass; the bytes kept in between."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in trainable.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = trainable.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if logits.dim() == 3:  # (rows, tokens, words): the last token's word is the label
            logits = logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, labels)
    torch.autograd.grad(loss, list(trainable.parameters.values()), allow_unused=True)
    return sum(kept.values())


if __name__ == "__main__":
    main()
