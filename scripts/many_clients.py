"""Thousands of tiny clients to try a federation with: public texts dealt out to authors.

    python scripts/many_clients.py ../shared/data/trec/train.jsonl runs/many_clients.jsonl --clients 5000
    fedcustom run recipes/many_clients.toml --out runs/many_clients

Authors have one, two or three rows, most of them one, as where people write under their names. Rows are dealt
from the source, shuffled anew whenever all of them were dealt: a run over them shows what many clients cost,
not how well a model does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHARES = (0.65, 0.2, 0.15)
"""Of the authors with one row, two rows and three."""


def dealt(rows: list[dict[str, Any]], clients: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows with an ``author``, in random order."""
    generator = np.random.default_rng(seed)
    sizes = 1 + generator.choice(len(SHARES), size=clients, p=SHARES)
    authors = generator.permutation(np.repeat(np.arange(clients), sizes))
    order: list[int] = []
    for author in authors.tolist():
        order = order or generator.permutation(len(rows)).tolist()
        yield {**rows[order.pop()], "author": f"author-{author:0{len(str(clients - 1))}d}"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="JSON lines, such as TREC's training questions")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--clients", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.source.read_text(encoding="utf-8").splitlines() if line]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in dealt(rows, given.clients, given.seed)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("".join(lines), encoding="utf-8")
    print(f"{given.out}: {len(lines)} rows of {given.clients} authors")


if __name__ == "__main__":
    main()
