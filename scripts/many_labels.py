"""A classification set of some 140 labels with ten rows each, put together from public sets.

    python scripts/many_labels.py ../shared/data runs/many_labels
    fedcustom compare recipes/many_labels.toml --methods prefix,lora --out runs/many_labels_compared

Labels are banking77's intents, TREC's fine types of questions, MedQuAD's types of questions and Dolly's
categories of instructions, each named after its set; those with fewer than ten training rows, or without a
test row, are left out. Test rows are at most twenty a label. ``train.jsonl`` and ``test.jsonl`` are written.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

SOURCES = {
    "banking77": ("text", "label"),
    "trec": ("text", "fine_label"),
    "medquad": ("question", "type"),
    "dolly15k": ("instruction", "category"),
}
"""The folders, with the columns of the text and of its label."""


def rows_of(folder: Path, split: str) -> dict[str, list[str]]:
    """The texts of each label, in the order of the files."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, (text, label) in SOURCES.items():
        for line in (folder / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[f"{name}: {row[label]}"].append(row[text])
    return found


def drawn(rows: list[str], most: int, generator: np.random.Generator) -> list[str]:
    """At most so many rows, without repetition of a text."""
    unique = list(dict.fromkeys(rows))
    order = generator.permutation(len(unique))[:most].tolist()
    return [unique[place] for place in order]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help=f"the folder that holds {', '.join(SOURCES)}")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--rows", type=int, default=10, help="training rows a label")
    parser.add_argument("--test-rows", type=int, default=20, help="test rows a label at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator = np.random.default_rng(given.seed)
    train, test = rows_of(given.data, "train"), rows_of(given.data, "test")
    enough = Counter({label: len(set(rows)) for label, rows in train.items()})
    labels = [label for label in sorted(train) if enough[label] >= given.rows and label in test]
    given.out.mkdir(parents=True, exist_ok=True)
    for name, split, most in (("train", train, given.rows), ("test", test, given.test_rows)):
        lines = [
            json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n"
            for label in labels
            for text in drawn(split[label], most, generator)
        ]
        (given.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{given.out / name}.jsonl: {len(lines)} rows of {len(labels)} labels")


if __name__ == "__main__":
    main()
