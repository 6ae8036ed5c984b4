"""Trivial baselines: do the methods beat those that need no customisation of the model?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.truncation import in_words as cut_in_words
from ..evaluation.degenerate import KINDS, in_words
from . import formatting as words
from .groups import Group, best_first, mean_and_interval, mean_metric, trivial_metric
from .methods import is_to_beat


def unbeaten(groups: Sequence[Group], metric: str) -> list[str]:
    """A sentence for each method that does not beat the best trivial baseline on its model and data, by means
    over seeds: the probe, the base model zero-shot and few-shot, copies of the prompts, the untuned
    model, as far as they are there.

    Clients alone (``local``) are themselves a baseline, and are left out.
    """
    found = []
    for together in _by_question(groups):
        trivial = _trivial(together, metric)
        if not trivial:
            continue
        name, value = min(trivial, key=lambda pair: best_first(pair[1], metric))
        found += [
            f"{group.label} does not beat {name}: {words.metric_name(metric)} "
            f"{words.score(mean, metric)} against {words.score(value, metric)}"
            for group, mean in _customised(together, metric)
            if best_first(mean, metric) >= best_first(value, metric)
        ]
    return found


def all_beat(groups: Sequence[Group], metric: str) -> str | None:
    """The sentence that all methods beat the trivial baselines (:func:`unbeaten`); None where one does not,
    or where only the untuned model is there: to beat one with a random head says nothing.
    """
    names: list[str] = []
    methods: set[str] = set()
    for together in _by_question(groups):
        trivial, customised = _trivial(together, metric), _customised(together, metric)
        if not customised:
            continue
        if not any(name != UNTUNED for name, _ in trivial):
            return None
        methods |= {group.label for group, _ in customised}
        names += [f"{name} ({words.score(value, metric)})" for name, value in trivial]
    if not methods or unbeaten(groups, metric):
        return None
    who = f"{words.capitalised(min(methods))} beats" if len(methods) == 1 else "All methods beat"
    return f"{who} {words.listed(list(dict.fromkeys(names)))}."


def degenerate(groups: Sequence[Group]) -> list[str]:
    """A sentence for each group whose outputs are degenerate, by the mean of the shares over its seeds."""
    found = []
    for group in groups:
        told = [run.summary.degenerate for run in group.runs if run.summary.degenerate]
        shares = {kind: mean_and_interval(each.get(kind, 0.0) for each in told)[0] for kind in KINDS}
        if said := in_words(shares):
            found.append(f"{group.label}: {said}")
    return found


def partly_generated(groups: Sequence[Group]) -> list[str]:
    """Sentences on runs that wrote texts for a part of the test inputs, each once."""
    counts = [run.summary.generated for group in groups for run in group.runs]
    return list(
        dict.fromkeys(
            f"BLEU, chrF and ROUGE-L are of {count.texts} of {count.of} test inputs "
            "(evaluation.generate_limit)"
            for count in counts
            if count is not None
        )
    )


def left_out(groups: Sequence[Group]) -> list[str]:
    """A sentence for each run on what its method cut or left out of prompts."""
    return [
        f"{group.label}, seed {run.summary.seed}: {text}"
        for group in groups
        for run in group.runs
        for text in run.summary.cuts
    ]


def truncated(groups: Sequence[Group]) -> list[str]:
    """Sentences on the inputs and targets that were cut, each once: runs on the same data cut the same."""
    counts = [run.summary.truncation for group in groups for run in group.runs]
    return list(dict.fromkeys(sentence for each in counts for sentence in cut_in_words(each)))


UNTUNED = "the untuned model"


def _trivial(groups: Sequence[Group], metric: str) -> list[tuple[str, float]]:
    """The trivial baselines that are there, with their means: of several of one name the best one."""
    means: dict[str, list[float]] = {}
    models = {group.runs[0].summary.model for group in groups if not is_to_beat(group.method)}
    for group in groups:
        if is_to_beat(group.method):
            name = group.own_title or f"the {group.plain_name}"
            if models and (model := group.runs[0].summary.model) not in models:
                name += f" of {model}"
            means.setdefault(name, []).append(mean_metric(group, metric)[0])
    found = [
        *((name, min(each, key=lambda value: best_first(value, metric))) for name, each in means.items()),
        ("copies of the prompts", trivial_metric(groups, "copy", metric)),
        (UNTUNED, trivial_metric(groups, "untuned", metric)),
    ]
    return [(name, value) for name, value in found if not math.isnan(value)]


def _customised(groups: Sequence[Group], metric: str) -> list[tuple[Group, float]]:
    """The groups that have to beat them, with their means."""
    asked = [group for group in groups if not is_to_beat(group.method) and group.baseline != "local"]
    means = [(group, mean_metric(group, metric)[0]) for group in asked]
    return [(group, mean) for group, mean in means if not math.isnan(mean)]


def _by_question(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of the same model and data together. A baseline of a model that nothing else is made of stands
    beside those of every model on its data: what is simple is so whatever the model is.
    """
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        result = group.runs[0].summary
        found.setdefault((result.model, result.data), []).append(group)
    trivial = {key for key, there in found.items() if all(is_to_beat(group.method) for group in there)}
    for model, data in trivial:
        others = [key for key in found if key[1] == data and key not in trivial]
        for key in others:
            found[key] = [*found[key], *found[model, data]]
        if others:
            del found[model, data]
    return list(found.values())
