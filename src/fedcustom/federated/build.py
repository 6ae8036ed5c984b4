"""The recipe's method built on its base model, and checks that they fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..aggregation.combine import offered_rule
from ..core.errors import ModelError, RecipeError
from ..data.build import with_builtin_columns
from ..data.examples import ClientData, Example, FederatedData
from ..data.many_clients import names_of
from ..methods import Context, Method, WeightTuning, build_method
from ..methods.protocol import TransformsUpdates
from ..methods.tuning.noised_sums import Keys, NoisedSums
from ..methods.tuning.release import ClientRelease, OwnNoise
from ..methods.tuning.summed_head import SumTerms
from ..methods.tuning.technique import Keeps
from ..models.configuration import context_length, has_learned_positions, load_configuration
from ..models.load import Base
from ..models.size_class import architecture_of
from ..privacy.client_mechanism import ClientMechanism
from ..recipe.recipe import Baseline, Recipe
from ..recipe.secure_sum import check_number
from ..transport.secure import ChangeVector
from ..transport.summed import Summation
from ..updates.transform import UpdateTransform, acts
from .example_run import example_privacy
from .schedule import EVERYONE

KEEPS: dict[Baseline, Keeps] = {"federated": "nothing", "centralised": "optimizer", "local": "everything"}
"""What clients keep to themselves between rounds."""


def make_method(
    recipe: Recipe,
    base: Base,
    federation: FederatedData | None = None,
    transforms: Sequence[UpdateTransform] = (),
    release: ClientRelease | None = None,
    own_noise: OwnNoise | None = None,
    alone: int = 1,
) -> Method:
    """The recipe's method on a loaded base model; without a federation, to predict only. ``transforms`` act
    on what its aggregation rule gives; ``release`` is how a server with a key of its own adds noise to it,
    ``own_noise`` how each client does to its change. Under secure sums a client leaves labels of which it has
    fewer than ``alone`` different texts out of what it sends for a head to be fitted.

    Raises:
        ModelError: the method does not fit the model.
        PluginError: the method or the rule is another package's, and cannot be loaded.
    """
    offered_rule(recipe.aggregation)  # one that cannot be loaded is refused now, not after a round
    data, _ = with_builtin_columns(recipe.data, recipe.clients)
    if federation is not None:
        recipe = recipe.settled(len(federation.clients))
    context = Context(
        base=base,
        data=data,
        training=recipe.training,
        aggregation=recipe.aggregation,
        evaluation=recipe.evaluation,
        rounds=recipe.rounds.count,
        seed=recipe.seed,
        keeps=KEEPS[recipe.baseline],
        keep_local=tuple(recipe.personalisation.keep),
        clients=len(federation.clients) if federation else 1,
        names=names_of(federation.clients) if federation else (),
        root=_root_examples(recipe, federation) if federation else [],
        public=federation.public if federation else [],
        model=recipe.model,
        transforms=tuple(transforms),
        privacy=recipe.client_privacy,
        release=release,
        own_noise=own_noise,
        row_privacy=example_privacy(recipe, federation),
        sums_only=recipe.sums_only,
        sum_terms=SumTerms(recipe.secure_sum.least_owners, alone) if recipe.secure_sum else SumTerms(),
    )
    return build_method(recipe.method, context)


def summation(
    recipe: Recipe, method: Method, clients: int, noised: Callable[[], NoisedSums | None] = lambda: None
) -> Summation | None:
    """How the answers of a recipe's clients, of whom there are so many, become vectors of integers that are
    summed; None where it asks for no secure sums. ``noised`` is how clients add noise of their own.

    Raises:
        RecipeError: too few or too many clients take part in a round, or the method's answers cannot be
            summed.
    """
    settings = recipe.secure_sum
    if settings is None or not settings.on:
        return None
    check_number(recipe, clients)
    weighted = recipe.aggregation.weighting == "examples"
    most = settings.most_examples if weighted else None
    losses = recipe.privacy is None or recipe.privacy.unit == "none"
    sites = recipe.rounds.cohort(clients)
    changes = ChangeVector(settings.largest, sites, most, recipe.seed, losses, noised())
    return Summation.of(method, changes, settings.terms())


def noised_sums(method: Method, mechanism: ClientMechanism | None, keys: Keys | None) -> NoisedSums | None:
    """How clients add noise to what is summed (``privacy.noise = "sum"``); None where they do not.

    Raises:
        RecipeError: the method trains no tensors.
    """
    if mechanism is None or mechanism.terms is None:
        return None
    if not isinstance(method, WeightTuning):
        raise RecipeError("privacy.noise = 'sum': the method's clients do not send changes of tensors")
    return NoisedSums.of(method, mechanism, keys)


def check_fit(recipe: Recipe) -> None:
    """Refuse what does not fit the base model's context, before any weight is loaded.

    Raises:
        ModelError: the model cannot be found, or prefix and input together are longer than its context.
    """
    configuration = load_configuration(recipe.model)
    limit, data = context_length(configuration), recipe.data
    length = recipe.method.context_tokens
    if limit is None:
        return
    if length >= limit:
        raise ModelError(f"method.length = {length}: {recipe.model.base} has a context of {limit} positions")
    prompt, written, setting = length + data.max_length, 0, ""
    architecture = architecture_of(configuration)
    if data.writes:
        default = type(recipe.evaluation).model_fields["max_new_tokens"].default
        if (most := recipe.evaluation.max_new_tokens) > max(limit, default):
            raise ModelError(
                f"evaluation.max_new_tokens = {most}: {recipe.model.base} has a context of {limit} positions"
            )
        written = data.max_target_length
        learned = has_learned_positions(configuration) and architecture != "encoder"  # which cannot generate
        if learned and recipe.evaluation.max_new_tokens > written:
            written = recipe.evaluation.max_new_tokens
            setting = f", evaluation.max_new_tokens = {written}"
    apart = architecture == "encoder-decoder"  # each half has positions of its own
    wanted = max(prompt, length + written) if apart else prompt + written
    if wanted > limit:
        raise ModelError(
            f"data.max_length = {data.max_length}{setting}: with method.length and targets {wanted} "
            f"positions are needed; {recipe.model.base} has {limit}"
        )


def check_transforms(transforms: Sequence[UpdateTransform], recipe: Recipe, method: Method) -> None:
    """Refuse a caller's transform that something of this run would pass by, unless it says that it may be
    skipped (:mod:`fedcustom.updates.transform`).

    Raises:
        RecipeError: names the transform, and what passes by.
    """
    for transform in transforms:
        combined = acts(transform, "on_aggregate")
        if getattr(transform, "may_be_skipped", False) or not (combined or acts(transform, "on_client")):
            continue
        gaps = [
            f"method.name = {recipe.method.name!r}: clients send other things than changes of trained tensors"
        ]
        if isinstance(method, TransformsUpdates):
            gaps = method.untransformed(aggregate=combined)
        if gaps:
            raise RecipeError(
                f"transform {transform.name!r}: would not act on all of this run: {gaps[0]}; change that, "
                "or set may_be_skipped on a transform that need not"
            )


def check_cohort(recipe: Recipe, data: FederatedData) -> None:
    """Refuse rounds with more clients than there are, and splits without examples.

    Raises:
        RecipeError: names the setting.
    """
    for key in ("clients_per_round", "min_clients"):
        asked = getattr(recipe.rounds, key)
        if asked is not None and asked > len(data.clients):
            raise RecipeError(f"rounds.{key} = {asked}: there are {len(data.clients)} clients")
    buffer = recipe.participation.buffer
    if buffer is not None and buffer > len(data.clients):
        raise RecipeError(f"participation.buffer = {buffer}: there are {len(data.clients)} clients")
    if not data.test or not data.development:
        part = "test" if not data.test else "development"
        raise RecipeError(f"clients.{part}_fraction: leaves no {part} examples; name data.{part} or raise it")
    if recipe.data.task == "retrieval":
        parts = [[*c.train, *c.development, *c.test] for c in data.clients.values()]
        held = {example.target for examples in parts for example in examples}
        lost = sum(example.target not in held for example in data.test)
        if lost:
            raise RecipeError(
                f"data.test = {recipe.data.test!r}: no client holds the documents of {lost} of "
                f"{len(data.test)} questions; name the clients there too (clients.column), or leave it unset"
            )


def pooled(data: FederatedData) -> dict[str, ClientData]:
    """One client that holds everybody's data."""
    parts = [
        [example for client in data.clients.values() for example in getattr(client, part)]
        for part in ("train", "development", "test")
    ]
    return {EVERYONE: ClientData(EVERYONE, *parts)}


def _root_examples(recipe: Recipe, data: FederatedData) -> list[Example]:
    """What the server itself trains on (FLTrust): development examples, drawn by the seed."""
    count = min(recipe.aggregation.root_examples, len(data.development))
    chosen = np.random.default_rng([recipe.seed, 11]).choice(len(data.development), count, replace=False)
    return [data.development[int(i)] for i in chosen]
