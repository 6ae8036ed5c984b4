"""Numbers as people read them, and the findings of a comparison as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .groups import (
    PERCENT_METRICS,
    Group,
    best_first,
    best_group,
    lower_is_better,
    mean_and_interval,
    mean_metric,
)

METRIC_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
}
MISSING = "–"


def metric_name(metric: str) -> str:
    """A metric as people write it: ``macro F1`` for ``macro_f1``."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def capitalised(text: str) -> str:
    """The text with a capital first letter; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def score(value: float, metric: str) -> str:
    """A metric's value: one decimal for metrics from 0 to 100, else three."""
    if math.isnan(value):
        return MISSING
    return f"{value:.{decimals(metric)}f}"


def decimals(metric: str) -> int:
    """How many decimals of a metric are shown."""
    return 1 if metric in PERCENT_METRICS else 3


def interval(half_width: float, metric: str) -> str:
    """Half the width of an interval, as in ``± 0.012``; empty where there is none."""
    return "" if math.isnan(half_width) else f"± {score(half_width, metric)}"


def _scaled(value: float, units: Sequence[str], separator: str) -> str:
    if math.isnan(value):
        return MISSING
    number, place = value, 0
    while abs(number) >= 999.5 and place < len(units) - 1:
        number, place = number / 1000, place + 1
    shown = f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
    return f"{shown}{separator}{units[place]}".strip()


def byte_count(value: float) -> str:
    """A number of bytes in decimal units: ``310 kB``."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"), "\N{NO-BREAK SPACE}")


def count(value: float) -> str:
    """A large number: ``73.7k``, ``22.7M``."""
    return _scaled(value, ("", "k", "M", "G", "T"), "")


def duration(seconds: float) -> str:
    """A duration in seconds, from two minutes on in minutes, from two hours on in hours."""
    if math.isnan(seconds):
        return MISSING
    value, unit = next(
        (seconds / size, name)
        for size, name, least in ((3600, "h", 7200), (60, "min", 120), (1, "s", -math.inf))
        if seconds >= least
    )
    return f"{value:.1f}\N{NO-BREAK SPACE}{unit}"


def rounds(numbers: Sequence[int]) -> str:
    """Round numbers with runs of them joined: ``2, 5–8``."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)


def plural(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _difference(value: float, metric: str) -> str:
    if lower_is_better(metric):
        return f"{abs(value):.3f}"
    points = abs(value) * (1 if metric in PERCENT_METRICS else 100)
    return f"{points:.1f} points"


def _compared_to(value: float, other: float, name: str, metric: str) -> str:
    if _difference(value - other, metric) == _difference(0.0, metric):
        return f"level with {name}"
    return f"{_difference(value - other, metric)} {'above' if value > other else 'below'} {name}"


def total_bytes(group: Group) -> float:
    """Bytes of a whole run, up and down, all clients; mean over seeds."""
    return mean_and_interval(run.summary.bytes.up_total + run.summary.bytes.down_total for run in group.runs)[
        0
    ]


def _times_fewer(group: Group, groups: Sequence[Group]) -> str:
    full = next((other for other in groups if other.method == "full" and other.baseline == "federated"), None)
    if full is None or full is group or not total_bytes(group) > 0:
        return ""
    ratio = total_bytes(full) / total_bytes(group)
    if ratio >= 1.05:
        return (
            f"sends {ratio:.0f} times fewer bytes than full fine-tuning"
            if ratio >= 9.5
            else (f"sends {ratio:.1f} times fewer bytes than full fine-tuning")
        )
    return "sends as many bytes as full fine-tuning or more"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def findings(groups: Sequence[Group], metric: str) -> list[str]:
    """What the numbers say, in plain sentences: the best method, its distance to the baselines, bytes, and
    doubt.
    """
    best = best_group(groups, metric)
    value, half = mean_metric(best, metric)
    centralised = [group for group in groups if group.baseline == "centralised" and group is not best]
    reference = next((group for group in centralised if group.method == best.method), None)
    reference = reference or next(iter(centralised), None)
    parts = [
        f"{capitalised(best.label)} reaches {score(value, metric)} {metric_name(metric)} on the test split"
    ]
    if reference is not None:
        parts.append(_compared_to(value, mean_metric(reference, metric)[0], reference.label, metric))
    parts += [part for part in [_times_fewer(best, groups)] if part]
    found = [_joined(parts) + "."]
    worst = mean_and_interval(run.summary.worst_client.get(metric, math.nan) for run in best.runs)[0]
    untuned = mean_and_interval(
        run.summary.untuned.get(metric, math.nan) for group in groups for run in group.runs
    )[0]
    beside = []
    if not math.isnan(untuned):
        beside.append(f"the untuned model has {score(untuned, metric)}")
    if not math.isnan(worst):
        beside.append(f"the weakest client is at {score(worst, metric)}")
    if beside:
        found.append(capitalised(" and ".join(beside)) + ".")
    found += [sentence for sentence in [_doubt(best, half, groups, metric)] if sentence]
    return found


def _doubt(best: Group, half: float, groups: Sequence[Group], metric: str) -> str:
    rivals = [group for group in groups if group.baseline == best.baseline and group is not best]
    if not rivals:
        return ""
    rival = min(rivals, key=lambda group: best_first(mean_metric(group, metric)[0], metric))
    other, other_half = mean_metric(rival, metric)
    if math.isnan(half) or math.isnan(other_half):
        return "With one seed there is no interval: small differences between methods may be chance."
    if abs(mean_metric(best, metric)[0] - other) <= half + other_half:
        return f"Its lead over {rival.label} is not certain: their 95\N{NO-BREAK SPACE}% intervals overlap."
    return ""
