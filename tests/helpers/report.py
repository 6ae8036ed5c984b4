"""Synthetic run directories, and what a page holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from fedcustom.report.groups import lower_is_better

PACKAGES = ("numpy", "torch", "pandas", "requests", "flask", "sympy", "networkx", "pillow")
"""The clients."""

TASK_METRICS = {
    "classification": {"accuracy": (0.12, 0.9), "macro_f1": (0.05, 0.82), "loss": (2.2, 0.45)},
    "generation": {"rouge_l": (18.0, 61.0), "bleu": (4.0, 32.0), "chrf": (20.0, 55.0), "loss": (3.4, 1.4)},
}
"""Each metric before training and where it ends."""

METHODS = {
    "prefix": (0.99, 73_728),
    "lora": (0.985, 147_456),
    "soft_prompt": (0.93, 7_680),
    "full": (1.0, 22_713_216),
}
"""The share of the way that a method gets, and its trainable parameters."""


def lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def scores(task: str, progress: float, noise: float = 0.0) -> dict[str, float]:
    found = {}
    for metric, (start, end) in TASK_METRICS[task].items():
        value = start + (end - start) * (progress + noise)
        found[metric] = max(0.01, value) if lower_is_better(metric) else min(value, 100 if end > 1 else 1)
    return found


def write_run(
    place: Path,
    *,
    method: str = "prefix",
    baseline: str = "federated",
    seed: int = 0,
    rounds: int = 20,
    clients: Sequence[str] = PACKAGES,
    task: str = "classification",
    predictions: Sequence[dict[str, Any]] = (),
    left_out: dict[str, str] | None = None,
    recipe: str = "",
    **changes: Any,
) -> Path:
    """A run directory with plausible numbers; ``changes`` replace keys of its summary."""
    place.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, len(method), len(baseline)])
    ceiling, parameters = METHODS.get(method, (0.95, 40_000))
    ceiling *= {"federated": 1.0, "centralised": 1.01, "local": 0.8}[baseline]
    payload = (parameters + 3465) * 4 + 900 if baseline == "federated" else 0
    history: list[dict[str, Any]] = [{"round": 0, "development": scores(task, 0.0)}]
    for number in range(1, rounds + 1):
        progress = ceiling * (1 - math.exp(-number / 5))
        history.append(
            {
                "round": number,
                "cohort": list(clients),
                "answered": list(clients),
                "left_out": left_out if left_out and number in (2, 3, 4, 9) else {},
                "train_loss": 1.0,
                "development": scores(task, progress, float(random.normal(0, 0.008))),
                "bytes_up": dict.fromkeys(clients, payload) if payload else {},
                "bytes_up_total": payload * len(clients) * number,
                "bytes_down_total": payload * len(clients) * number,
                "seconds": {"train": 2.0, "evaluate": 0.6, "aggregate": 0.01},
            }
        )
    by_client = {
        client: {"examples": 410, "test_examples": 50}
        | scores(task, ceiling, float(random.normal(-0.02, 0.05)))
        for client in clients
    }
    metrics = list(TASK_METRICS[task])
    summary = {
        "method": method,
        "baseline": baseline,
        "model": "builtin:minilm",
        "data": "builtin:docstrings",
        "task": task,
        "seed": seed,
        "rounds": rounds,
        "best_round": max(0, rounds - 2),
        "metrics": scores(task, ceiling, float(random.normal(0, 0.008))),
        "untuned": scores(task, 0.0),
        "client_mean": {
            name: float(np.mean([values[name] for values in by_client.values()])) for name in metrics
        },
        "worst_client": {
            name: (max if lower_is_better(name) else min)(values[name] for values in by_client.values())
            for name in metrics
        },
        "clients": by_client,
        "trainable_parameters": parameters,
        "head_parameters": 3465 if task == "classification" else 0,
        "bytes": {
            "up_per_client_round": payload,
            "down_per_client_round": payload,
            "up_total": payload * len(clients) * rounds,
            "down_total": payload * len(clients) * rounds,
        },
        "seconds": {
            "total": 61.2 + 3 * len(method) + seed,
            "train": 40.1,
            "evaluate": 12.0,
            "aggregate": 0.1,
        },
        "peak_memory_bytes": 912_000_000 + 40 * parameters,
    } | changes
    (place / "metrics.jsonl").write_text(lines(history), encoding="utf-8")
    (place / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (place / "predictions.jsonl").write_text(lines(predictions), encoding="utf-8")
    (place / "recipe.toml").write_text(
        recipe
        or f'seed = {seed}\nrounds = {rounds}\n\n[method]\nname = "{method}"\nbaseline = "{baseline}"\n',
        encoding="utf-8",
    )
    (place / "environment.json").write_text(
        json.dumps(
            {
                "python": "3.11.9",
                "versions": {"torch": "2.8.0"},
                "threads": 2,
                "started": f"2026-01-0{seed + 1}",
            }
        ),
        encoding="utf-8",
    )
    return place


def classified(seed: int, number: int = 400) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    rows = []
    for place in range(number):
        label = PACKAGES[random.integers(len(PACKAGES))]
        predicted = label if random.random() < 0.85 else PACKAGES[random.integers(len(PACKAGES))]
        text = f"Return example {place} of an array whose elements lie between two bounds, along an axis."
        rows.append(
            {
                "text": text,
                "label": label,
                "prediction": predicted,
                "probability": float(random.uniform(0.4, 1)),
            }
        )
    return rows


def generated(number: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "source": f"name[The Eagle {place}], eatType[coffee shop], food[French], price[cheap]",
            "references": [
                f"The Eagle {place} is a cheap French coffee shop by the river.",
                f"By the riverside, The Eagle {place} serves cheap French food.",
            ],
            "prediction": f"The Eagle {place} is a French coffee shop with cheap prices.",
        }
        for place in range(number)
    ]


def small_run(place: Path, accuracy: float, seed: int, **changes: Any) -> Path:
    values = {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "loss": 1 - accuracy}
    worst = {"worst_client": {"accuracy": accuracy - 0.2, "macro_f1": 0.1, "loss": 2.0}}
    return write_run(place, seed=seed, rounds=3, metrics=values, **(worst | changes))


class Tags(HTMLParser):
    """The elements of a page, and the text of its scripts and of the rest."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.headings: list[int] = []
        self._inside = ""
        self.feed(page.read_text(encoding="utf-8"))

    def plots(self) -> set[str]:
        """The names of the charts."""
        return {attributes["data-plot"] or "" for _, attributes in self.tags if "data-plot" in attributes}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data
