"""What the sections of a recipe say of each other, and which of their settings do not go together."""

from __future__ import annotations

from typing import Any

from ..data.settings import TaskKind
from ..evaluation.settings import (
    CHOICE_METRIC,
    CLASSIFICATION_METRICS,
    PREFERENCE_METRICS,
    RETRIEVAL_METRICS,
)
from ..methods.settings import TuningSettings
from .label_skew import check_label_skew, why_no_head_fit
from .objective import check_objective
from .privacy import check_privacy
from .sections import FEDERATED_ONLY, Sections
from .secure_sum import check_secure_sum

SELECTION_METRICS: dict[TaskKind, tuple[str, ...]] = {
    "classification": CLASSIFICATION_METRICS,
    "generation": ("loss", CHOICE_METRIC),
    "chat": ("loss", CHOICE_METRIC),
    "preference": PREFERENCE_METRICS,
    "retrieval": RETRIEVAL_METRICS,
}
"""By what the best round can be chosen."""


def check_combinations(recipe: Sections, sections: dict[str, Any]) -> None:
    """Refuse a recipe whose sections contradict each other. ``sections`` has all of them by name.

    Raises:
        ValueError: names the setting, and what is allowed.
    """
    count, asked = recipe.clients.count, recipe.rounds.clients_per_round
    if recipe.clients.partition != "natural" and asked is not None and asked > count:
        raise ValueError(f"rounds.clients_per_round = {asked}: there are {count} clients (clients.count)")
    if asked is not None and recipe.rounds.min_clients > asked:
        raise ValueError(
            f"rounds.min_clients = {recipe.rounds.min_clients}: {asked} clients take part in a round"
        )
    if recipe.training.warmup_rounds >= recipe.rounds.count:
        raise ValueError(
            f"training.warmup_rounds = {recipe.training.warmup_rounds}: "
            f"must be below rounds.count = {recipe.rounds.count}"
        )
    if recipe.data.task in ("chat", "preference") and (recipe.public.source or recipe.public.fraction):
        task = recipe.data.task
        raise ValueError(f"[public]: no method for data.task = {task!r} uses public texts; leave it out")
    check_objective(recipe.data.task, recipe.training)
    _check_training(recipe)
    _check_search(recipe)
    _check_correction(recipe)
    _check_federated(recipe)
    check_privacy(recipe)
    check_secure_sum(recipe)
    recipe.method.check_sections(recipe.baseline, sections)
    _check_workers(recipe)
    buffer = recipe.participation.buffer
    if buffer is not None and recipe.clients.partition != "natural" and buffer > count:
        raise ValueError(f"participation.buffer = {buffer}: there are {count} clients (clients.count)")
    allowed = SELECTION_METRICS[recipe.data.task]
    metric = recipe.evaluation.metric
    if metric is not None and metric not in allowed:
        raise ValueError(
            f"evaluation.metric = {metric!r}: allowed for {recipe.data.task}: {', '.join(allowed)}"
        )
    _check_generation(recipe)


def _check_generation(recipe: Sections) -> None:
    """Which texts are written in evaluation, and whether any can be."""
    settings, generates = recipe.evaluation, recipe.data.texts_are_scored
    if settings.metric == CHOICE_METRIC and recipe.data.options is None:
        raise ValueError(f"evaluation.metric = {CHOICE_METRIC!r}: name the column of options (data.options)")
    if not settings.writes and not generates:
        raise ValueError(f"evaluation.generate = false: is for generation, not {recipe.data.task}")
    if settings.generate_limit is None:
        return
    where = f"evaluation.generate_limit = {settings.generate_limit}"
    if not generates:
        raise ValueError(f"{where}: is for generation, not {recipe.data.task}")
    if not settings.writes:
        raise ValueError(f"{where}: does not go with evaluation.generate = false")


def _check_training(recipe: Sections) -> None:
    """What only a classifier's training has, and its data."""
    training = recipe.training
    check_label_skew(recipe)
    if recipe.data.task != "classification":
        if recipe.attack.kind in ("label_flip", "backdoor"):
            raise ValueError(f"attack.kind = {recipe.attack.kind!r}: needs labels")
        if recipe.noise.labels:
            raise ValueError(f"noise.labels = {recipe.noise.labels}: needs labels")
        for key in ("logit_adjustment", "freeze_head_rounds", "fit_head_rounds"):
            if getattr(training, key):
                raise ValueError(f"training.{key} = {getattr(training, key)!r}: needs labels and a head")
    frozen = training.freeze_head_rounds or 0
    if frozen >= recipe.rounds.count and not training.fit_head_rounds:
        raise ValueError(
            f"training.freeze_head_rounds = {training.freeze_head_rounds}: "
            f"must be below rounds.count = {recipe.rounds.count}, or the head fitted (fit_head_rounds)"
        )
    if training.fit_head_rounds:
        _check_head_fit(recipe)
    federated = recipe.baseline == "federated"
    if recipe.method.only_fits and federated and (reason := why_no_head_fit(recipe)):
        raise ValueError(f"method.name = {recipe.method.name!r}: {reason}")
    unadjusted = training.logit_adjustment is None and training.fit_head_rounds is not None
    unadjusted = unadjusted and training.label_skew != "adjust"
    unadjusted = unadjusted or training.label_skew in ("none", "balance")
    if (training.logit_adjustment == 0 or unadjusted) and training.prior_count != 1:
        raise ValueError(
            f"training.prior_count = {training.prior_count}: has no effect without logit_adjustment"
        )


def _check_search(recipe: Sections) -> None:
    """What a search of learning rates needs."""
    training = recipe.training
    if not training.search_rates and training.learning_rate != "auto":
        return
    where = "learning_rate = 'auto'" if training.learning_rate == "auto" else "search_rates"
    if not isinstance(recipe.method, TuningSettings):
        raise ValueError(f"training.{where}: method {recipe.method.name!r} trains no tensors by steps")
    if recipe.participation.buffer is not None:
        raise ValueError(f"training.{where}: does not go with participation.buffer")


def _check_head_fit(recipe: Sections) -> None:
    """When a head is fitted, and what that goes with."""
    last = recipe.rounds.count
    wanted = recipe.training.rounds_of_head_fits(last)
    where = f"training.fit_head_rounds = {recipe.training.fit_head_rounds}"
    if len(wanted) < len(recipe.training.fit_head_rounds or ()) or not wanted <= set(range(1, last + 1)):
        raise ValueError(f"{where}: must be different rounds from 1 to rounds.count = {last}, or -1")
    if len(wanted) == last and not recipe.method.only_fits:
        raise ValueError(f"{where}: leaves no round of {last} to train in")
    if reason := why_no_head_fit(recipe):
        raise ValueError(f"{where}: {reason} (fit_head_rounds = [] and logit_adjustment = 0 turn it off)")


def _check_correction(recipe: Sections) -> None:
    """What corrections of client drift are defined for."""
    correction, training = recipe.aggregation.correction, recipe.training
    if correction == "none":
        return
    where = f"aggregation.correction = {correction!r}"
    if recipe.aggregation.rule != "mean" or recipe.participation.buffer is not None:
        raise ValueError(f"{where}: needs aggregation.rule = 'mean' and no participation.buffer")
    if correction == "scaffold" and (training.optimizer != "sgd" or training.momentum or training.clip_norm):
        raise ValueError(
            f"{where}: is defined for plain gradient steps; set training.optimizer = 'sgd', "
            "training.momentum = 0 and training.clip_norm = 0"
        )
    if correction == "feddyn" and training.proximal:
        raise ValueError(f"{where}: has a proximal term of its own; leave training.proximal at 0")
    if correction == "feddyn" and recipe.aggregation.server_learning_rate is not None:
        raise ValueError(f"{where}: has a server step of its own; leave server_learning_rate unset")


def _check_workers(recipe: Sections) -> None:
    """Whether the workers have what the model is to lie on."""
    gpus = recipe.workers.gpus if recipe.workers is not None else None
    if gpus == 0 and (recipe.model.device.startswith("cuda") or recipe.model.device_map):
        raise ValueError(
            f"workers.gpus = 0: model.device = {recipe.model.device!r} needs one"
            if recipe.model.device_map is None
            else f"workers.gpus = 0: model.device_map = {recipe.model.device_map!r} needs some"
        )


def _check_federated(recipe: Sections) -> None:
    """What only a federated run has, and what late answers do not fit."""
    if recipe.baseline != "federated":
        for section in FEDERATED_ONLY:
            set_ = getattr(recipe, section)
            if set_ is not None and set_ != type(set_)():
                raise ValueError(f"[{section}]: needs baseline = 'federated', not {recipe.baseline!r}")
    if recipe.participation.buffer is not None:
        if recipe.aggregation.rule == "fltrust":
            raise ValueError("participation.buffer: does not go with aggregation.rule = 'fltrust'")
        if setting := recipe.method.needs_same_state:
            raise ValueError(f"participation.buffer: {setting} needs all at one state")
    if (setting := recipe.method.replaces_rule or recipe.method.turns_tensors) and recipe.compression.down:
        raise ValueError(f"compression.down: does not go with {setting}")
    if recipe.method.redraws_tensors and recipe.compression.error_feedback:
        raise ValueError(
            "compression.error_feedback: does not go with a method that sends other tensors in each round"
        )
    if any(not part for part in recipe.personalisation.keep):
        raise ValueError("personalisation.keep: an empty text names every tensor; name parts")
