"""A quantised base beside an exact one: memory, seconds and loss, method by method, on SmolLM2-135M.

    python scripts/quantization.py --rows FOLDER/train.jsonl --schemes none,int8,nf4 --methods lora,prefix
    python scripts/quantization.py --rows FOLDER/train.jsonl --most      # peaks, each in a process of its own

Rows are instructions with answers (``instruction``, ``context``, ``response``, as in Dolly). The methods
train on the first of them and are tested on others. Seconds of a step are medians; exact and quantised models
take turns, so that other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core import environment
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.data.tokens import TokenizedExample
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods import Context, WeightTuning, build_method, registry
from fedcustom.models.load import load_base
from fedcustom.models.quantised_layers import exact_weights, stored_bytes
from fedcustom.models.settings import ModelSettings
from fedcustom.training.settings import TrainingSettings

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"name": "lora", "rank": 8}, 1e-3),
    "prefix": ({"name": "prefix", "kind": "memory"}, 3e-3),
}
"""Settings and learning rates."""

TASK = LearningTask("generation")


def main() -> None:
    """Measure and print tables; or, as the child, the peak of one."""
    parser = argparse.ArgumentParser(description="A quantised base beside an exact one.")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--base", default="builtin:smollm2")
    parser.add_argument("--schemes", default="none,int8,int4,nf4")
    parser.add_argument("--methods", default="lora,prefix")
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an input, and of an answer")
    parser.add_argument("--most", action="store_true", help="measure peaks of memory instead")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "SCHEME"))
    arguments = parser.parse_args()
    schemes, methods = arguments.schemes.split(","), arguments.methods.split(",")
    if arguments.child:
        print(json.dumps(peak(*arguments.child, arguments)))
    elif arguments.most:
        print("| method | base | most, loading | loaded | most, training |\n|---|---|---|---|---|")
        for method in methods:
            for scheme in schemes:
                found = in_child(method, scheme)
                sizes = " | ".join(f"{found[key] / 1e9:.2f} GB" for key in ("loading", "loaded", "training"))
                print(f"| {method} | {scheme} | {sizes} |", flush=True)
    else:
        compare(methods, schemes, arguments)


def compare(methods: list[str], schemes: list[str], arguments: argparse.Namespace) -> None:
    """The table of losses and seconds."""
    rows = examples(arguments.rows, arguments.train + arguments.test)
    print(
        "| method | base | weights | seconds a step, to none | loss, untuned | loss, tuned "
        "| tuned, on the exact base |\n|---|---|---|---|---|---|---|"
    )
    for name in methods:
        made = {scheme: build(name, scheme, arguments) for scheme in schemes}
        train = {scheme: batches(method, rows, arguments) for scheme, method in made.items()}
        held = {scheme: method.tokens(rows[arguments.train :]) for scheme, method in made.items()}
        before = {scheme: loss(method, held[scheme]) for scheme, method in made.items()}
        optimizers = {
            scheme: torch.optim.AdamW(method.trainable.parameters.values(), lr=METHODS[name][1])
            for scheme, method in made.items()
        }
        seconds: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        for step in range(arguments.steps):
            for scheme, method in made.items():
                seconds[scheme].append(stepped(method, train[scheme][step], optimizers[scheme]))
        middle = {scheme: statistics.median(own[2:]) for scheme, own in seconds.items()}
        for scheme, method in made.items():
            after = loss(method, held[scheme])
            with exact_weights(method.base.model, method.base.quantised):
                exact = loss(method, held[scheme])
            size = stored_bytes(method.base.model) / 1e6
            ratio = middle[scheme] / middle[schemes[0]]
            print(
                f"| {name} | {scheme} | {size:.0f} MB | {ratio:.2f} | {before[scheme]:.4f} | {after:.4f} "
                f"| {exact:.4f} |",
                flush=True,
            )
        print(f"<!-- {name}: {middle[schemes[0]]:.3f} s a step with {schemes[0]} -->", flush=True)


def examples(path: Path, count: int) -> list[Example]:
    """The first rows with answers of moderate length."""
    found = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            context = f"\n{row['context']}" if row.get("context") else ""
            found.append(Example(f"{row['instruction']}{context}\n", target=row["response"]))
            if len(found) == count:
                break
    return found


def build(name: str, scheme: str, arguments: argparse.Namespace) -> WeightTuning:
    """A method on a base in bfloat16 whose matrices are stored by a scheme."""
    chosen: Any = None if scheme == "none" else scheme
    settings, _ = METHODS[name]
    base = load_base(ModelSettings(base=arguments.base, dtype="bfloat16", quantization=chosen), TASK, 0)
    tokens = arguments.tokens
    context = Context(
        base=base,
        data=DataSettings(task="generation", max_length=tokens, max_target_length=tokens),
        training=TrainingSettings(learning_rate=METHODS[name][1]),
        aggregation=AggregationSettings(),
        evaluation=EvaluationSettings(max_new_tokens=2),
        rounds=1,
        seed=0,
    )
    made = build_method(registry.settings_of(settings["name"])(**settings), context)
    assert isinstance(made, WeightTuning)
    return made


def batches(
    method: WeightTuning, rows: list[Example], arguments: argparse.Namespace
) -> list[list[TokenizedExample]]:
    """As many batches as there are steps, the same for every scheme."""
    tokens, size = method.tokens(rows[: arguments.train]), arguments.batch
    return [[tokens[(step * size + i) % len(tokens)] for i in range(size)] for step in range(arguments.steps)]


def stepped(method: WeightTuning, rows: list[TokenizedExample], optimizer: torch.optim.Optimizer) -> float:
    """One step; its seconds."""
    begun = time.perf_counter()
    method.objective.loss(method.trainable.model, method.objective.collate(rows)).backward()
    torch.nn.utils.clip_grad_norm_(method.trainable.parameters.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun


@torch.no_grad()
def loss(method: WeightTuning, rows: list[TokenizedExample]) -> float:
    """Mean cross-entropy of a target token, in nats."""
    total = units = 0.0
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        count = sum(method.objective.units(row) for row in some)
        total += float(
            method.objective.row_losses(method.trainable.model, method.objective.collate(some)).sum()
        )
        units += count
    return total / units


def in_child(method: str, scheme: str) -> dict[str, float]:
    """The peaks of one method and scheme, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", method, scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, {scheme}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(name: str, scheme: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Main memory of this process: at most while loading, loaded, and at most in three steps."""
    method = build(name, scheme, arguments)
    loading, loaded = environment.peak_memory(), environment.held_memory(torch.device("cpu"))
    environment.restart_peak_memory()
    rows = batches(method, examples(arguments.rows, arguments.train), arguments)[:3]
    optimizer = torch.optim.AdamW(method.trainable.parameters.values(), lr=1e-4)
    for some in rows:
        stepped(method, some, optimizer)
    return {"loading": loading, "loaded": loaded, "training": environment.peak_memory()}


if __name__ == "__main__":
    main()
