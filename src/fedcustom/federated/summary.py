"""The summary of a finished run (docs/run_directory.md)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..core import environment
from ..data.examples import FederatedData
from ..data.truncation import CutCount
from ..evaluation.metrics import Metrics, client_mean, worst_client
from ..privacy.accounting import Guarantee
from ..recipe.recipe import Recipe
from .evaluator import Result
from .run_directory import Row

PHASES = ("train", "evaluate", "aggregate")


def summarise(
    recipe: Recipe,
    data: FederatedData,
    result: Result,
    rows: Sequence[Row],
    *,
    best: int,
    sizes: tuple[int, int],
    untuned: Mapping[str, float],
    elapsed: float,
    finishing: float,
    temperature: float | None,
    truncation: Mapping[str, CutCount],
    cuts: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
    a_query: tuple[float, float] | None = None,
    guarantee: Guarantee | None = None,
) -> dict[str, Any]:
    """The content of ``summary.json``.

    ``rows`` are the lines of the history, ``best`` the round whose state was evaluated, ``sizes`` the numbers
    that are trained (the method's and the head's), ``elapsed`` and ``finishing`` the seconds of this process
    up to the final evaluation and of that, ``temperature`` what the logits were divided by after the last
    round, ``truncation`` what is cut of the data, ``cuts`` sentences on what a method itself cut or left out,
    ``a_query`` the bytes down and up of one query, where a
    method searches its clients, ``guarantee`` what is promised of privacy.
    """
    seconds = {part: sum(row["seconds"][part] for row in rows) for part in PHASES}
    earlier = sum(seconds.values())
    seconds["evaluate"] += finishing
    trained = [row for row in rows if row["round"] > 0]
    sent = search if search and recipe.baseline == "federated" else {}
    return {
        "method": recipe.method.name,
        "baseline": recipe.baseline,
        "model": recipe.model.base,
        "data": recipe.data.source,
        "task": recipe.data.task,
        "seed": recipe.seed,
        "rounds": recipe.rounds.count,
        "best_round": best,
        "labels": list(data.task.labels),
        "client_count": len(data.clients),
        "truncation": {part: asdict(count) for part, count in truncation.items()},
        **({"cuts": list(cuts)} if cuts else {}),
        "metrics": result.metrics,
        "untuned": dict(untuned),
        **({"copy": result.copy} if result.copy else {}),
        **_written(result, len(data.test)),
        **({"degenerate": result.degenerate} if result.degenerate else {}),
        "temperature": temperature,
        "client_mean": result.client_mean,
        "worst_client": result.worst_client,
        "clients": result.clients,
        **_personalised(result.personalised),
        **_probed(result.probes),
        **({"privacy": _promise(guarantee)} if guarantee else {}),
        "trainable_parameters": sizes[0],
        "head_parameters": sizes[1],
        **({"search": dict(search)} if search else {}),
        "bytes": {
            **_bytes(trained, recipe.training.rounds_of_head_fits(recipe.rounds.count), sent),
            **_a_query(a_query if recipe.baseline == "federated" else None),
        },
        "seconds": {
            "total": round(max(elapsed, earlier) + finishing, 3),
            **{part: round(value, 3) for part, value in seconds.items()},
        },
        "peak_memory_bytes": max(environment.peak_memory(), *(row["peak_memory_bytes"] for row in trained)),
    }


def _written(result: Result, examples: int) -> dict[str, Any]:
    """For how many of the test examples a text was written, where it was not for all."""
    if result.predictions is None or result.predictions.written is None:
        return {}
    return {"generated": {"texts": len(result.predictions.written), "of": examples}}


def _promise(guarantee: Guarantee) -> dict[str, Any]:
    """A guarantee in four figures; privacy.json has all of it."""
    return {key: getattr(guarantee, key) for key in ("unit", "epsilon", "delta", "valid")}


def _bytes(rows: Sequence[Row], fits: Collection[int], search: Mapping[str, Any]) -> dict[str, int]:
    """Bytes a client and round (means over the rounds that train, rounded to whole bytes) and in total, with
    those of a search of learning rates.
    """
    found = {}
    for way in ("up", "down"):
        training = [n for row in rows if row["round"] not in fits for n in row[f"bytes_{way}"].values()]
        found[f"{way}_per_client_round"] = round(sum(training) / len(training)) if training else 0
        found[f"{way}_total"] = sum(sum(row[f"bytes_{way}"].values()) for row in rows)
        found[f"{way}_total"] += int(search.get(f"bytes_{way}", 0))
    return found


def _a_query(sent: tuple[float, float] | None) -> dict[str, int]:
    """Bytes of one query, where that is known."""
    if sent is None or math.isnan(sum(sent)):
        return {}
    return {"down_per_query": round(sent[0]), "up_per_query": round(sent[1])}


def _probed(probes: Mapping[str, Mapping[str, Metrics]]) -> dict[str, Any]:
    """The summary's parts on perturbed test texts, and on a backdoor: how often its target is said."""
    found: dict[str, Any] = {}
    if probes.get("perturbed"):
        found["perturbed"] = {name: dict(metrics) for name, metrics in probes["perturbed"].items()}
    if probes.get("backdoor"):
        found["backdoor"] = {name: metrics["accuracy"] for name, metrics in probes["backdoor"].items()}
    return found


def _personalised(clients: dict[str, Metrics]) -> dict[str, Any]:
    """The summary's part on the clients' own versions, where they have such."""
    if not clients:
        return {}
    mean, worst = client_mean(clients), worst_client(clients)
    return {"personalised": {"client_mean": mean, "worst_client": worst, "clients": clients}}
