"""Which shares of E2E's attribute values stand in the outputs of runs, word for word, as a Markdown table.

    python scripts/attributes_said.py runs/e2e-prefix-seed-0 runs/e2e-lora-seed-0

Values of ``familyFriendly`` (yes or no) are left out: no sentence repeats them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

ATTRIBUTE = re.compile(r"([^\[\],]+)\[([^\]]*)\]")


def shares(run: Path) -> tuple[dict[str, float], float]:
    """For each attribute how often its value is in the output, and the mean number of words of an output."""
    said, asked, words, rows = Counter[str](), Counter[str](), 0, 0
    for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        words, rows = words + len(row["prediction"].split()), rows + 1
        for name, value in ATTRIBUTE.findall(row["source"]):
            if (name := name.strip()) != "familyFriendly":
                asked[name] += 1
                said[name] += value.casefold() in row["prediction"].casefold()
    return {name: said[name] / asked[name] for name in asked}, words / rows


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description="Attribute values in the outputs of runs on E2E.")
    parser.add_argument("runs", nargs="+", type=Path)
    found = {run: shares(run) for run in parser.parse_args().runs}
    names = sorted({name for values, _ in found.values() for name in values})
    print(f"| run | {' | '.join(names)} | words |\n|{'---|' * (len(names) + 2)}")
    for run, (values, words) in found.items():
        print(f"| {run.name} | {' | '.join(f'{values.get(name, 0):.2f}' for name in names)} | {words:.1f} |")


if __name__ == "__main__":
    main()
