"""Privacy of single rows in a recipe: the defaults that go with it, and what it refuses
(docs/privacy_examples.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .sections import Sections

EXAMPLE_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"clip_norm": 0.0},
    "evaluation": {"select": "last", "calibrate": False},
}
"""What is filled in where a recipe hides rows and says nothing else."""

FOR_CLIENTS = ("participation", "bands", "head_clip", "accept_noise")
"""Settings of ``[privacy]`` that only a run that hides clients has."""


def why_no_example_privacy(recipe: Sections) -> Iterator[str]:
    """What of a recipe does not go with hidden rows, each naming its setting and what is allowed."""
    yield from _section(recipe)
    if setting := recipe.method.unsliced:
        yield (
            f"{setting}: its rows have no gradients of their own to be bounded; use lora, prefix, "
            "soft_prompt, adapter, ia3, bitfit or ln_tuning, without networks and dropout"
        )
    yield from _training(recipe)
    yield from _server(recipe)


def _section(recipe: Sections) -> Iterator[str]:
    """What of the section itself is for clients."""
    privacy = recipe.privacy
    assert privacy is not None
    fields = type(privacy).model_fields
    for key in FOR_CLIENTS:
        if (value := getattr(privacy, key)) != fields[key].default:
            yield f"privacy.{key} = {value!r}: is for unit = 'client'; leave it at its default"
    for key in ("clip", "clip_head"):
        if getattr(privacy, key) == "adaptive":
            yield (
                f"privacy.{key} = 'adaptive': the share of rows within a bound would be a release too; use "
                "'unit' or a number"
            )


def _training(recipe: Sections) -> Iterator[str]:
    """What of training discloses more than noised gradients, or couples rows."""
    training = recipe.training
    if training.dropout:
        yield "training.dropout = true: rows are bounded in passes without dropout; use false"
    if recipe.personalisation.finetune_epochs:
        yield (
            f"personalisation.finetune_epochs = {recipe.personalisation.finetune_epochs}: it has no noise, "
            "and across sites its metrics are sent; use 0"
        )
    if recipe.model.compile:
        yield "model.compile = true: rows are bounded in passes that are not compiled; use false"
    if training.learning_rate == "auto":
        yield (
            "training.learning_rate = 'auto': the search's trials would be spent too; choose a rate on other "
            "data"
        )
    if training.search_rates:
        yield (
            f"training.search_rates = {training.search_rates}: the search's trials would be spent too; "
            "choose a rate on other data"
        )
    if training.label_skew in ("adjust", "balance"):
        yield (
            f"training.label_skew = {training.label_skew!r}: a client's shares of labels have no noise; use "
            "'none'"
        )
    if training.logit_adjustment:
        yield (
            f"training.logit_adjustment = {training.logit_adjustment}: a row's loss would depend on the "
            "labels of the others; use 0"
        )
    yield from _head(recipe)


def _head(recipe: Sections) -> Iterator[str]:
    """What of a fit of the head is not accounted for."""
    training = recipe.training
    if training.fit_head:
        yield (
            "training.fit_head = true: would fit the head after training too, where clients' own rows choose "
            "between two heads; use fit_head_rounds = [1]"
        )
    rounds = training.fit_head_rounds
    if rounds not in (None, [], [1]):
        yield (
            f"training.fit_head_rounds = {rounds}: a head is fitted to noised sums once, before training; "
            "use [1] or []"
        )
    if rounds and training.fit_head_steps:
        yield (
            f"training.fit_head_steps = {training.fit_head_steps}: each exchange would have to be noised; "
            "use 0"
        )
    if rounds and training.fit_head_least_texts is not None:
        yield (
            f"training.fit_head_least_texts = {training.fit_head_least_texts}: noise hides rows, and all of "
            "them are in the sums; leave it unset"
        )


def _server(recipe: Sections) -> Iterator[str]:
    """What of the rounds and of merging is not accounted for."""
    aggregation, rounds = recipe.aggregation, recipe.rounds
    if aggregation.correction != "none":
        yield (
            f"aggregation.correction = {aggregation.correction!r}: what clients remember and send beside "
            "changes is not accounted for; use 'none'"
        )
    if aggregation.rule == "fltrust":
        yield (
            "aggregation.rule = 'fltrust': the server would train on development rows without noise; use "
            "another rule"
        )
    if rounds.selection == "balanced":
        yield "rounds.selection = 'balanced': clients would tell of their labels; use 'uniform'"
    if rounds.checkpoint_every != 1:
        yield (
            f"rounds.checkpoint_every = {rounds.checkpoint_every}: a resumed run would spend the steps since "
            "its checkpoint again; use 1"
        )
    if recipe.participation.buffer is not None:
        yield (
            f"participation.buffer = {recipe.participation.buffer}: who answers first decides how often a "
            "client trains; leave it unset"
        )
