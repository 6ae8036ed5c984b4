"""Model selection: the better of the states that a round may end with, by development score."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.metrics import Metrics, is_better
from ..methods import UNFINISHED, Aggregate, State
from ..recipe import Recipe
from .simulation import Evaluation


def better_state(
    recipe: Recipe, candidates: Sequence[Aggregate], evaluation: Evaluation
) -> tuple[Aggregate, Metrics]:
    """The best state on the development split, the later of two that are alike; the last one where the recipe
    keeps the last round's. A state that the first exchange of a head fit left unfinished is finished.

    Args:
        candidates: In the order in which they came about; server state and values are those of the last,
            whose report says what was kept.
    """
    metric = recipe.metric
    if recipe.evaluation.select == "last":
        candidates = candidates[-1:]
    scored = [(found, evaluation.development(found.state)) for found in candidates]
    best = len(scored) - 1
    for place in reversed(range(best)):
        if is_better(scored[place][1][metric], scored[best][1][metric], metric):
            best = place
    chosen, development = scored[best]
    if best < len(scored) - 1:
        kept = "the discriminant" if UNFINISHED in chosen.state.values else "as it was"
        scores = ", ".join(f"{found[metric]:.4f}" for _, found in scored)
        latest = candidates[-1]
        fitted = latest.report.get("head", "fitted")
        report = {"head": f"{fitted}; kept {kept} (development {metric} of candidates: {scores})"}
        state = State(chosen.state.tensors, dict(latest.state.server), dict(latest.state.values))
        chosen = Aggregate(state, report)
    return chosen, development
