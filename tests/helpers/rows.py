"""Rows of a tiny data set, whose words give the label away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

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
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
