"""Plots of an experiment as SVG: a dot a mean, with its 95 % interval."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from ..report import words
from ..report.axes import round_numbers, value_range
from .tables import Group, Section

COLOURS = ("#0b7285", "#c2410c", "#5b3fa8", "#3f7d20", "#b0215e", "#8a6d00", "#4a5568", "#1d4ed8")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 320, 56, 44, 16


def dot_plot(section: Section, metric: str) -> str:
    """One plot of a section: its columns along x, its rows as colours with a legend; without any script."""
    found = {place: group.mean(lambda r: r.metrics.get(metric, math.nan)) for place, group in _there(section)}
    found = {place: pair for place, pair in found.items() if not math.isnan(pair[0])}
    if not found:
        return ""
    ends = [
        mean + sign * (0 if math.isnan(half) else half) for mean, half in found.values() for sign in (-1, 1)
    ]
    low, high = value_range(ends, metric)
    legend = 18 * math.ceil(len(section.rows) / 4)
    height = HEIGHT + legend

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    step = (WIDTH - LEFT - 12) / len(section.columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#1f2933">',
        f"<title>{html.escape(section.heading or words.metric_name(metric))}</title>",
    ]
    for tick in round_numbers(low, high):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - 12}" stroke="#d9dee3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for place, column in enumerate(section.columns):
        x = LEFT + (place + 0.5) * step
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{html.escape(column)}</text>'
        )
    for number, row in enumerate(section.rows):
        colour = COLOURS[number % len(COLOURS)]
        shift = (number - (len(section.rows) - 1) / 2) * min(14.0, 0.8 * step / max(1, len(section.rows)))
        for place, column in enumerate(section.columns):
            if (row, column) not in found:
                continue
            mean, half = found[row, column]
            x = LEFT + (place + 0.5) * step + shift
            if not math.isnan(half):
                parts.append(
                    f'<path d="M{x:.1f} {y(mean - half):.1f}V{y(mean + half):.1f}" stroke="{colour}" '
                    'stroke-width="2"/>'
                )
            parts.append(f'<circle cx="{x:.1f}" cy="{y(mean):.1f}" r="4" fill="{colour}"/>')
        x, line = LEFT + (number % 4) * (WIDTH - LEFT) / 4, HEIGHT + 18 * (number // 4)
        parts.append(f'<circle cx="{x:.1f}" cy="{line - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 9:.1f}" y="{line}">{html.escape(row)}</text>')
    return "".join([*parts, "</svg>"])


def _there(section: Section) -> Sequence[tuple[tuple[str, str], Group]]:
    return list(section.groups.items())
