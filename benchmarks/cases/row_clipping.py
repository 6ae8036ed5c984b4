"""(h) Row clipping: steps that bound and noise each row's gradient, side by side with plain ones.

``python -m benchmarks.cases.row_clipping``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods.messages import Work
from fedcustom.methods.protocol import Client
from fedcustom.methods.registry import build_method, settings_of
from fedcustom.methods.tuning.method import WeightTuning
from fedcustom.methods.tuning.technique import Context
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.privacy.example_mechanism import ExamplePrivacy, Releases
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.training.settings import TrainingSettings

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "prefix memory": {"name": "prefix", "kind": "memory"},
    "prefix kv": {"name": "prefix", "kind": "kv"},
    "bitfit": {"name": "bitfit"},
}

WORDS = ("what", "river", "name", "old", "city", "who", "how", "many", "first", "country", "does", "long")


def measure(
    methods: Sequence[str] = tuple(METHODS), *, clients: int = 2, batch_size: int = 64, repeats: int = 3
) -> dict[str, Any]:
    """Processor seconds of a step of a cohort, plain and private in turn after one of each to warm up, and
    the ratio of each pair: the median. Questions of 5 to 20 words, MiniLM, six labels.
    """
    generator, found = np.random.default_rng(0), {}
    labels = tuple("abcdef")
    rows = [
        Example(" ".join(generator.choice(WORDS, int(generator.integers(5, 21)))), label=int(label))
        for label in generator.integers(0, len(labels), clients * batch_size)
    ]
    # A whole batch for both, so that both pass the same rows.
    parts = {f"c{i}": rows[i * batch_size : (i + 1) * batch_size] for i in range(clients)}
    section = PrivacySettings(unit="example", noise_multiplier=1.0, delta=1e-4)
    privacy = ExamplePrivacy(section, batch_size, 0, dict.fromkeys(parts, Releases(10**6)))
    for name in methods:
        made = {kind: _method(name, labels, batch_size, given) for kind, given in
                (("plain", None), ("private", privacy))}  # fmt: skip
        seconds: dict[str, list[float]] = {kind: [] for kind in made}
        for repeat in range(repeats + 1):
            for kind, method in made.items():
                owners = {one: Client(one, ClientData(one, part)) for one, part in parts.items()}
                tasks = method.configure(method.initialise(), 1, {one: Work(steps=1) for one in owners})
                begun = time.process_time()
                answers = method.execute_together([(tasks[one], owner) for one, owner in owners.items()])
                if repeat:
                    seconds[kind].append(time.process_time() - begun)
                assert not any(isinstance(answer, Exception) for answer in answers)
        ratios = [b / a for a, b in zip(seconds["plain"], seconds["private"], strict=True)]
        found[name] = {
            "plain": statistics.median(seconds["plain"]),
            "private": statistics.median(seconds["private"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
        print(json.dumps({name: found[name]}), flush=True)
    return found


def _method(
    name: str, labels: tuple[str, ...], batch_size: int, privacy: ExamplePrivacy | None
) -> WeightTuning:
    data = DataSettings(max_length=48)
    base = load_base(ModelSettings(), LearningTask.of(data, labels), seed=0)
    context = Context(
        base=base,
        data=data,
        training=TrainingSettings(learning_rate=0.001, batch_size=batch_size, clip_norm=0),
        aggregation=AggregationSettings(),
        evaluation=EvaluationSettings(),
        rounds=2,
        seed=0,
        clients=2,
        row_privacy=privacy,
    )
    values = {key: value for key, value in METHODS[name].items() if key != "name"}
    made = build_method(settings_of(METHODS[name]["name"])(**values), context)
    assert isinstance(made, WeightTuning)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(given.methods, clients=given.clients, batch_size=given.batch_size, repeats=given.repeats)
