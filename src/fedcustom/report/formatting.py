"""Formatting of numbers, and the findings of a comparison as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .groups import (
    PERCENT_METRICS,
    UNBOUNDED_METRICS,
    Group,
    best_development,
    best_first,
    best_group,
    bytes_to_reach,
    lower_is_better,
    mean_and_interval,
    mean_metric,
    trivial_metric,
)
from .methods import is_to_beat, settings
from .read import Run

METRIC_NAMES = {
    "accuracy": "accuracy",
    "preference_accuracy": "reward acc.",
    "likelihood_accuracy": "likelihood acc.",
    "calibration_error": "ECE",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "choice_accuracy": "choice accuracy",
    "mrr": "MRR@10",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
}
MISSING = "–"

LONGEST_TEXT = 800
"""Characters of a text of a client or a model that are shown."""


def metric_name(metric: str) -> str:
    """A metric as people write it: ``macro F1`` for ``macro_f1``."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def capitalised(text: str) -> str:
    """The text with a capital first letter, unless its first word has its own spelling, as chrF does."""
    first = text.partition(" ")[0]
    return text if first != first.lower() else text[:1].upper() + text[1:]


def run_title(group: Group, run: Run) -> str:
    """A run of a group, by its seed."""
    return f"{capitalised(group.label)}, seed {run.summary.seed}"


def shortened(text: str) -> str:
    """The beginning of a text that is too long to be shown."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def score(value: float, metric: str) -> str:
    """A metric's value: one decimal for metrics from 0 to 100, else three; a perplexity of 100,000 or more
    with two digits.
    """
    if math.isnan(value):
        return MISSING
    if metric == "perplexity" and value >= 1e5:
        return f"{value:.1e}"
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


def listed(texts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)


def clients(number: int, scored: int) -> str:
    """How many clients there are, and of how many a test part is known: ``20 (18 with a test part)``."""
    if scored >= number:
        return f"{number:,}" if number else ""
    return f"{number:,} ({f'{scored:,}' if scored else 'none'} with a test part)"


def _difference(value: float, metric: str) -> str:
    if lower_is_better(metric) or metric in UNBOUNDED_METRICS:
        return f"{abs(value):.3f}"
    points = abs(value) * (1 if metric in PERCENT_METRICS else 100)
    return f"{points:.1f} points"


def _compared_to(value: float, other: float, name: str, metric: str) -> str:
    if math.isnan(value) or math.isnan(other):
        return f"not comparable with {name}"
    difference = _difference(value - other, metric)
    if difference == _difference(0.0, metric):
        return f"level with {name}"
    return f"{difference} {'above' if value > other else 'below'} {name}"


def total_bytes(group: Group) -> float:
    """Bytes of a whole run, up and down, all clients; mean over seeds."""
    totals = [run.summary.bytes.up_total + run.summary.bytes.down_total for run in group.runs]
    return mean_and_interval(totals)[0]


def _times_fewer(group: Group, groups: Sequence[Group]) -> str:
    federated = (other for other in groups if other.baseline == "federated")
    full = next((other for other in federated if settings(other.method).sends_whole_model), None)
    if full is None or full is group or not total_bytes(group) > 0:
        return ""
    ratio = total_bytes(full) / total_bytes(group)
    if ratio < 1.05:
        return f"sends no fewer bytes than {full.plain_name}"
    return f"sends {ratio:.{0 if ratio >= 9.5 else 1}f} times fewer bytes than {full.plain_name}"


def findings(groups: Sequence[Group], metric: str) -> list[str]:
    """What the numbers say, in sentences: the best method beside its baseline, traffic, clients, doubt."""
    groups = [group for group in groups if not is_to_beat(group.method)] or groups  # see baselines.py
    best = best_group(groups, metric)
    value = mean_metric(best, metric)[0]
    centralised = [group for group in groups if group.baseline == "centralised" and group is not best]
    reference = next((group for group in centralised if group.method == best.method), None)
    reference = reference or next(iter(centralised), None)
    reached = f"{score(value, metric)} {metric_name(metric)}"
    sentence = f"{capitalised(best.label)} reaches {reached} on the test split"
    if reference is not None:
        sentence += f", {_compared_to(value, mean_metric(reference, metric)[0], reference.label, metric)},"
    if fewer := _times_fewer(best, groups):
        sentence += f" and {fewer}"
    found = [sentence.rstrip(",") + "."]
    worst = mean_and_interval(run.summary.worst_client.get(metric, math.nan) for run in best.runs)[0]
    if not math.isnan(worst):
        found.append(f"Its weakest client is at {score(worst, metric)}.")
    down, up = (mean_and_interval(sent)[0] for sent in _a_query(best))
    if not math.isnan(down + up):
        found.append(f"A query costs {byte_count(down)} down to the clients and {byte_count(up)} up.")
    untuned = trivial_metric(groups, "untuned", metric)
    if not math.isnan(untuned):
        found.append(f"The untuned model has {score(untuned, metric)}.")
    rivals = [group for group in groups if group.baseline == best.baseline and group is not best]
    if rivals:
        second = min(rivals, key=lambda group: best_first(mean_metric(group, metric)[0], metric))
        found += _second(best, second, groups, metric)
    return found + _at_equal_quality(groups, metric)


def _a_query(group: Group) -> tuple[list[float], list[float]]:
    """Bytes of one query by run: down to all clients that are asked, and up from them."""
    sent = [run.summary.bytes for run in group.runs]
    return [each.down_per_query for each in sent], [each.up_per_query for each in sent]


def _at_equal_quality(groups: Sequence[Group], metric: str) -> list[str]:
    """What methods that send predictions needed for their best development quality, and what those that send
    weights needed for the same.
    """
    federated = [group for group in groups if group.baseline == "federated"]
    sharing = [group for group in federated if settings(group.method).sends_weights]
    found = []
    for group in federated:
        if not settings(group.method).sends_predictions:
            continue
        value, sent = best_development(group, metric)
        for other in sharing if sent > 0 else []:
            needed = bytes_to_reach(other, metric, value)
            sentence = (
                f"For {score(value, metric)} {metric_name(metric)} on the development split "
                f"{group.method_name} sent {byte_count(sent)} in all; {other.method_name} "
            )
            if math.isnan(needed):
                found.append(f"{sentence}did not get there with {byte_count(total_bytes(other))}.")
            else:
                found.append(f"{sentence}{byte_count(needed)} ({_scaled(needed / sent, ('',), '')} times).")
    return found


def _second(best: Group, second: Group, groups: Sequence[Group], metric: str) -> list[str]:
    """How far the second best is behind, what it saves, and whether the seeds tell the two apart."""
    value, half = mean_metric(best, metric)
    other, other_half = mean_metric(second, metric)
    if math.isnan(value) or math.isnan(other):
        return []
    difference = _difference(value - other, metric)
    behind = "level with it" if difference == _difference(0.0, metric) else f"{difference} behind"
    sentence = f"Second is {second.label}, {behind}"
    if settings(best.method).sends_whole_model and (fewer := _times_fewer(second, groups)):
        sentence += f", which {fewer}"
    if math.isnan(half) or math.isnan(other_half):
        return [
            f"{sentence}.",
            "With one seed there is no interval: small differences may be chance.",
        ]
    if abs(value - other) <= half + other_half:
        return [f"{sentence}; that order is not certain, since their 95% intervals overlap."]
    return [f"{sentence}."]
