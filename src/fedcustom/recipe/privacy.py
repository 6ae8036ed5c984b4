"""Differential privacy in a recipe: the defaults that go with it, and what it refuses (docs/privacy.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .example_privacy import EXAMPLE_DEFAULTS, why_no_example_privacy
from .sections import Sections

CLIENT_DEFAULTS: dict[str, dict[str, Any]] = {
    "aggregation": {"weighting": "uniform"},
    "training": {"optimizer": "sgd", "fit_head_steps": 0},
    "evaluation": {"select": "last", "calibrate": False},
}
"""What is filled in where a recipe hides clients and says nothing else."""

DEFAULTS = {"client": CLIENT_DEFAULTS, "example": EXAMPLE_DEFAULTS}
"""The same by unit."""

OWN_DEVELOPMENT = ("evaluation",)
"""Of these sections, where the development split is the server's own, the usual defaults stay."""

FEWEST_DRAWN = 40
"""Clients in a Poisson round on average at least: then an empty round has probability below 1e-17."""


def with_private_defaults(values: Any) -> Any:
    """A recipe's content with the defaults of its ``privacy.unit``: the last round's state, no calibration
    on clients' rows and no head fit, or one of a single exchange; where clients are hidden also weights of
    one and plain gradient steps, where rows are, no further clipping of noised gradients.
    """
    if not isinstance(values, Mapping):
        return values
    privacy = values.get("privacy")
    if not isinstance(privacy, Mapping) or privacy.get("unit") not in DEFAULTS:
        return values
    filled = dict(values)
    data = values.get("data")
    own = isinstance(data, Mapping) and data.get("development") is not None
    for section, defaults in DEFAULTS[privacy["unit"]].items():
        given = values.get(section, {})
        if isinstance(given, Mapping) and not (own and section in OWN_DEVELOPMENT):
            filled[section] = {**defaults, **given}
    training = filled.get("training")
    if isinstance(training, Mapping) and training.get("fit_head") is None:
        rounds = training.get("fit_head_rounds")
        filled["training"] = {**training, "fit_head_rounds": [] if rounds is None else rounds}
        if rounds and privacy["unit"] == "example":
            filled["training"] = {"fit_head_steps": 0, **filled["training"]}
    return filled


def check_privacy(recipe: Sections) -> None:
    """Refuse what a guarantee does not go with.

    Raises:
        ValueError: names the setting, and what is allowed.
    """
    privacy = recipe.privacy
    if privacy is None or privacy.unit == "none":
        return
    if privacy.unit == "example":
        for reason in (*why_no_example_privacy(recipe), *_head_without_fit(recipe), *_evaluation(recipe)):
            raise ValueError(f"{reason} (privacy.unit = 'example')")
        return
    own = _own_noise(recipe) if privacy.place in ("sum", "client") else _server_noise(recipe)
    own += _head_without_fit(recipe)
    for reason in (*own, *_merging(recipe), *_training(recipe), *_evaluation(recipe), *_rounds(recipe)):
        raise ValueError(f"{reason} (privacy.unit = 'client')")


def _head_without_fit(recipe: Sections) -> list[str]:
    """Settings of a fit of the head that would have no effect."""
    privacy, training = recipe.privacy, recipe.training
    assert privacy is not None
    if training.fit_head_rounds or training.fit_head:
        return []
    return [
        f"privacy.{key} = {getattr(privacy, key)}: has no effect while no head is fitted; set "
        "training.fit_head_rounds = [1]"
        for key in ("head_share", "head_clip")
        if getattr(privacy, key) != type(privacy).model_fields[key].default
    ]


def _server_noise(recipe: Sections) -> list[str]:
    """What a server that adds the noise has to see."""
    if recipe.secure_sum is None or not recipe.secure_sum.on:
        return []
    return [
        "secure_sum.on = true: with privacy.noise = 'server' the trusted server bounds each client's change, "
        "which it would not see; set it to false, or let clients add the noise (privacy.noise = 'sum')"
    ]


def _own_noise(recipe: Sections) -> list[str]:
    """What clients that add the noise themselves cannot do."""
    privacy, sums, found = recipe.privacy, recipe.secure_sum, list[str]()
    assert privacy is not None
    where = f"with privacy.noise = {privacy.place!r}"
    on = sums is not None and sums.on
    if on and privacy.place == "client":
        return ["secure_sum.on = true: goes with privacy.noise = 'sum', of less noise; use that"]
    if not on and privacy.place == "sum":
        return ["privacy.noise = 'sum': one client's noise is too little by itself; set secure_sum.on = true"]
    if sums is not None and sums.bound is not None:
        found.append(
            f"secure_sum.bound = {sums.bound:g}: has no effect {where}, where each client bounds its change "
            "(privacy.clip); leave it unset"
        )
    if privacy.participation == "poisson":
        found.append(
            f"privacy.participation = 'poisson': {where} the server is not trusted, and would know who was "
            "drawn; use 'cyclic'"
        )
    if (privacy.bands or 1) > 1:
        found.append(
            f"privacy.bands = {privacy.bands}: {where} each round's noise is independent; leave it unset"
        )
    for key in ("clip", "clip_head"):
        if getattr(privacy, key) == "adaptive":
            found.append(
                f"privacy.{key} = 'adaptive': {where} nobody counts the changes within a bound; use 'unit' "
                "or a number"
            )
    if recipe.training.fit_head_rounds or recipe.training.fit_head:
        key = "fit_head_rounds" if recipe.training.fit_head_rounds else "fit_head"
        found.append(f"training.{key}: {where} no head is fitted; leave it out, and the head is trained")
    return found


def _merging(recipe: Sections) -> list[str]:
    """What of the server's side has no bounded sensitivity."""
    aggregation, found = recipe.aggregation, list[str]()
    if setting := recipe.method.unbounded:
        found.append(f"{setting}: one client's part in what the server releases is not bounded")
    if aggregation.rule != "mean":
        found.append(f"aggregation.rule = {aggregation.rule!r}: one client can move it at will; use 'mean'")
    if aggregation.weighting != "uniform":
        found.append(
            f"aggregation.weighting = {aggregation.weighting!r}: weights are data too; use 'uniform'"
        )
    if aggregation.correction != "none":
        found.append(
            f"aggregation.correction = {aggregation.correction!r}: what clients send beside changes has no "
            "noise; use 'none'"
        )
    if aggregation.max_norm_ratio is not None:
        found.append(
            "aggregation.max_norm_ratio: would leave a client out by what others send; leave it unset, for "
            "every change is bounded anyway"
        )
    return found


def _training(recipe: Sections) -> list[str]:
    """What of training discloses more than noised sums."""
    training, found = recipe.training, list[str]()
    for key in ("search_rates", "learning_rate"):
        if key == "learning_rate" and training.learning_rate != "auto":
            continue
        if getattr(training, key):
            found.append(
                f"training.{key} = {getattr(training, key)!r}: the search's trials would be spent too; "
                "choose a rate on other data"
            )
    if training.label_skew == "balance":
        found.append("training.label_skew = 'balance': clients would tell of their labels; use 'adjust'")
    fits = training.fit_head_rounds or training.fit_head
    if fits and training.fit_head_steps:
        found.append(
            f"training.fit_head_steps = {training.fit_head_steps}: each exchange would have to be noised; "
            "use 0"
        )
    return found


def _evaluation(recipe: Sections) -> list[str]:
    """What of clients' rows would shape the model without noise."""
    evaluation, found = recipe.evaluation, list[str]()
    if recipe.data.development is not None:
        return found
    if evaluation.select != "last":
        found.append(
            f"evaluation.select = {evaluation.select!r}: clients' own rows would choose the model; use "
            "'last', or name a split of the server's (data.development)"
        )
    if evaluation.calibrate and recipe.data.task == "classification":
        found.append(
            "evaluation.calibrate = true: clients' own rows would scale the model's logits; use false, or "
            "name a split of the server's (data.development)"
        )
    return found


def _rounds(recipe: Sections) -> list[str]:
    """What of the schedule is not accounted for."""
    rounds, found = recipe.rounds, list[str]()
    if rounds.checkpoint_every != 1:
        found.append(
            f"rounds.checkpoint_every = {rounds.checkpoint_every}: a state may leave the server only after "
            "its checkpoint is on disk, or a resumed run would spend more; use 1"
        )
    if rounds.selection == "balanced":
        found.append("rounds.selection = 'balanced': clients would tell of their labels; use 'uniform'")
    if recipe.participation.buffer is not None:
        found.append(
            f"participation.buffer = {recipe.participation.buffer}: who answers first decides the turns; "
            "leave it unset"
        )
    privacy, asked = recipe.privacy, rounds.clients_per_round
    if privacy is not None and privacy.participation == "poisson" and (asked or FEWEST_DRAWN) < FEWEST_DRAWN:
        found.append(
            f"rounds.clients_per_round = {asked}: with privacy.participation = 'poisson' a round may be "
            f"empty; use {FEWEST_DRAWN} at least, or 'cyclic'"
        )
    return found
