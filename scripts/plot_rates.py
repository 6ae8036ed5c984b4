"""Development score against learning rate of an experiment's trials, as an SVG file.

    python scripts/plot_rates.py results/classifiers/search.json docs/prefix-rates.svg --metric accuracy \\
        --name prefix="key-value pairs" --name memory="prefix memory" --name lora=LoRA
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from fedcustom.core.files import read_json, write_text
from fedcustom.experiment.plots import COLOURS, HEIGHT, SYMBOLS
from fedcustom.report.axes import Axis, Tick, linear, value_range
from fedcustom.report.svg import Chart, Mark


def main() -> None:
    """Read the trials, and write the plot."""
    parser = argparse.ArgumentParser(description="Development score against learning rate.")
    parser.add_argument("search", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--title", default="")
    parser.add_argument("--name", action="append", default=[], help="group=name in the legend; repeatable")
    arguments = parser.parse_args()
    names = dict(entry.split("=", 1) for entry in arguments.name)
    groups = read_json(arguments.search)["groups"]
    lines = {
        name: [(trial["rate"], trial["score"]) for trial in groups[group]["trials"]]
        for group, name in names.items()
    }
    write_text(arguments.out, plot(lines, arguments.metric, arguments.title))


def plot(lines: dict[str, list[tuple[float, float]]], metric: str, title: str) -> str:
    """A line a group, with rates on a logarithmic axis."""
    points = [point for line in lines.values() for point in line]
    rates = sorted({math.log10(rate) for rate, _ in points})
    low, high = rates[0] - 0.1, rates[-1] + 0.1
    ticks = tuple(Tick((rate - low) / (high - low), f"{10**rate:.3g}") for rate in rates)
    colours = {name: COLOURS[number] for number, name in enumerate(lines)}
    chart = Chart(
        Axis(low, high, _apart(ticks)), linear(*value_range([score for _, score in points], metric)),
        "learning rate", height=HEIGHT, grid="y", colours=colours,
    )  # fmt: skip
    for number, (name, line) in enumerate(lines.items()):
        places = [((math.log10(r) - low) / (high - low), chart.y.place(score)) for r, score in line]
        chart.line(places, name, "")
        marks = [Mark(x, y, f"{r:g}: {score:.4f}") for (x, y), (r, score) in zip(places, line, strict=True)]
        chart.marks(marks, name, SYMBOLS[number], name)
        chart.entry(name, name, "", SYMBOLS[number])
    return chart.file(title)


def _apart(ticks: tuple[Tick, ...]) -> tuple[Tick, ...]:
    """Ticks whose labels do not touch."""
    kept: list[Tick] = []
    for tick in ticks:
        if not kept or tick.place - kept[-1].place > 0.08:
            kept.append(tick)
    return tuple(kept)


if __name__ == "__main__":
    main()
