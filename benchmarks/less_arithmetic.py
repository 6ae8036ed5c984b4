"""Processor time with what is left out: ``python -m benchmarks.less_arithmetic --data ../shared/data/trec``.

Rounds of TREC-6 with all layers of an encoder and with the upper half alone, while what enters it is not yet
kept and afterwards; and steps of decoders that classify, with the last layer of all tokens and of one. One
thread; processor time, since machines are shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers

from fedcustom import Callback
from fedcustom.core.environment import describe
from fedcustom.federated.run import run_recipe
from fedcustom.models.forward import classification_loss
from fedcustom.models.last_token import last_token_only
from fedcustom.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "less_arithmetic.json"

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "memory": {"name": "prefix", "kind": "memory", "length": 16},
}

ROUNDS = 4


class Rounds(Callback):
    """Processor seconds of each round."""

    def __init__(self) -> None:
        self.begun, self.seconds = 0.0, list[float]()

    def on_round_start(self, number: int) -> None:
        """Begin to count."""
        self.begun = time.process_time()

    def on_round_end(self, row: Any) -> None:
        """A round's seconds."""
        self.seconds.append(time.process_time() - self.begun)


def round_seconds(data: Path, method: dict[str, Any], clients: int, rows: int) -> dict[str, float]:
    """Seconds of the first round, and the median of those after it but the last, which is evaluated."""
    recipe = Recipe.model_validate(
        {
            "model": {"base": "builtin:minilm", "dtype": "bfloat16"},
            "data": {"source": str(data), "test": "test", "test_limit": 1, "max_length": 48},
            "clients": {"count": clients, "partition": "iid", "limit": rows, "development_fraction": 0.1},
            "method": method,
            "training": {"local_epochs": 1, "batch_size": 8, "learning_rate": 0.008, "fit_head_rounds": []},
            "rounds": {"count": ROUNDS},
            "evaluation": {"every": ROUNDS, "untuned": False},
        }
    )
    found = Rounds()
    with TemporaryDirectory() as folder:
        run_recipe(recipe, Path(folder) / "run", callbacks=[found])
    return {"first": found.seconds[0], "later": statistics.median(found.seconds[1:-1])}


def step_seconds(config: Any, rows: int, tokens: int, steps: int) -> dict[str, float]:
    """Seconds of a training step of LoRA, in the median, with the last layer of all tokens and of one."""
    kind_of_model: Any = transformers.AutoModelForSequenceClassification
    model = kind_of_model.from_config(config).eval()
    if not last_token_only(model):
        raise SystemExit(f"the last layer of {config.model_type} cannot be computed for one token alone")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=8))
    chosen = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    ids = torch.randint(5, 300, (rows, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 6}
    last = next(module for module in model.modules() if "forward" in vars(module))
    short, taken = vars(last)["forward"], dict[str, list[float]](all=[], one=[])
    for step in range(2 * (steps + 1)):
        kind = ("all", "one")[step % 2]
        vars(last).pop("forward", None)
        if kind == "one":
            vars(last)["forward"] = short
        begun = time.process_time()
        torch.autograd.grad(classification_loss(wrapped, batch), chosen)
        if step > 1:
            taken[kind].append(time.process_time() - begun)
    return {kind: statistics.median(each) for kind, each in taken.items()}


COMMON: dict[str, Any] = {"vocab_size": 1000, "num_labels": 6, "pad_token_id": 0}

SHAPES: dict[str, Callable[[], Any]] = {
    "GPT-2-shaped, 4 layers of 256": lambda: transformers.GPT2Config(
        n_embd=256, n_layer=4, n_head=4, **COMMON
    ),
    "SmolLM2-135M's shape": lambda: transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, **COMMON,
    ),
}  # fmt: skip
"""Models with random weights; few words, since a classifier computes nothing with them."""


def main() -> None:
    """Measure and write ``results/less_arithmetic.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder of TREC-6")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rows", type=int, default=24, help="rows of a client")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=["rounds", "steps"], choices=["rounds", "steps"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found["machine"] = describe()
    if "steps" in options.parts:
        for name, config in SHAPES.items():
            found.setdefault("steps", {})[name] = step_seconds(config(), 8, 48, options.steps)
            print(name, found["steps"][name], flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "rounds" in options.parts:
        for name, method in METHODS.items():
            for first in (0, 3):
                chosen = method | ({"first_layer": first} if first else {})
                seconds = round_seconds(options.data, chosen, options.clients, options.rows)
                found.setdefault("rounds", {})[f"{name}, first_layer = {first}"] = seconds
                print(name, first, seconds, flush=True)
                RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
