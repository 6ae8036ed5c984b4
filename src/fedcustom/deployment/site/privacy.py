"""Privacy at a site: what its policy asks of a recipe's noise, and what noised releases may spend."""

from __future__ import annotations

from ...core.errors import PolicyError
from ...privacy.accounting import Event
from ...privacy.accounting import Ledger as Spending
from ...privacy.client_mechanism import ClientMechanism, delta_of, integer_event
from ...privacy.example_mechanism import ExampleMechanism, Releases
from ...privacy.noise import NoiseKey
from ...recipe.recipe import Recipe
from .ledger import Ledger, Release
from .settings import PolicySettings

ROUNDING = 1e-9
"""By how much, relative to it, an epsilon that is computed twice may differ."""


def check_privacy(policy: PolicySettings, recipe: Recipe) -> None:
    """Refuse a recipe that hides less than the site wants hidden.

    Raises:
        PolicyError: names the line of the policy.
    """
    privacy = recipe.privacy
    unit = privacy.unit if privacy is not None else "none"
    if not (policy.minimum_noise or policy.max_epsilon is not None or policy.least_unit != "none"):
        return
    said = f"the recipe says privacy.unit = {unit!r}"
    if policy.least_unit == "client" and unit != "client":
        raise PolicyError(f"policy.least_unit = 'client': {said}")
    made_here = privacy is not None and privacy.place != "server"
    if policy.least_unit == "example" and not (unit in ("example", "client") and made_here):
        raise PolicyError(
            f"policy.least_unit = 'example': {said}{'' if unit == 'none' else ', with noise of the server'}; "
            "noise must be made at this site"
        )
    if policy.max_epsilon is not None and (unit == "none" or not made_here):
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: {said}; allowed: 'example', or 'client' with "
            "privacy.noise = 'sum' or 'client'"
        )
    if privacy is None or unit == "none":
        raise PolicyError(f"policy.minimum_noise = {policy.minimum_noise}: {said}")
    if not privacy.is_valid:
        raise PolicyError(
            "privacy.randomness = 'seeded': everybody could subtract the noise, and this site's policy asks "
            "for privacy; use 'secret'"
        )
    if policy.minimum_noise and not made_here:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: the recipe's noise is added by the server, "
            "which a site cannot check (privacy.noise)"
        )
    if privacy.noise_multiplier is not None and privacy.noise_multiplier < policy.minimum_noise:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: the recipe says privacy.noise_multiplier = "
            f"{privacy.noise_multiplier}"
        )
    epsilon = privacy.epsilon
    if policy.max_epsilon is not None and epsilon is not None and epsilon > policy.max_epsilon:
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: the recipe says privacy.epsilon = {epsilon}"
        )


def check_noise(policy: PolicySettings, mechanism: ExampleMechanism) -> None:
    """Refuse noise for this site's rows below what its policy says.

    Raises:
        PolicyError: names the line of the policy.
    """
    _check_least_noise(policy, mechanism, "this site's rows")
    if mechanism.head_noise is not None and mechanism.head_noise < policy.minimum_noise:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: sums for the head have noise of "
            f"{mechanism.head_noise:.4g} by privacy.head_share = {mechanism.settings.head_share}"
        )


def _check_least_noise(
    policy: PolicySettings, mechanism: ExampleMechanism | ClientMechanism, whose: str
) -> None:
    if mechanism.noise_multiplier < policy.minimum_noise:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: for {whose} privacy.epsilon = "
            f"{mechanism.settings.epsilon} takes noise of {mechanism.noise_multiplier:.4g}"
        )


def check_own_noise(policy: PolicySettings, mechanism: ClientMechanism) -> None:
    """Refuse noise that hides this site as a whole below what its policy says.

    Raises:
        PolicyError: names the line of the policy.
    """
    _check_least_noise(policy, mechanism, "this run's clients")
    promised = mechanism.guarantee().epsilon
    if policy.max_epsilon is not None and promised > policy.max_epsilon * (1 + ROUNDING):
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: the recipe's noise has epsilon {promised:.4g}"
        )


def turn_of(mechanism: ClientMechanism) -> Release:
    """What one noised change, by which a site hides itself, is in its ledger."""
    return Release(
        noise_multiplier=mechanism.noise_multiplier,
        sampling=1.0,
        delta=delta_of(mechanism.settings),
        steps=1,
        unit="client",
        integers=mechanism.terms is not None,
    )


def check_turn(policy: PolicySettings, ledger: Ledger, run: str, mechanism: ClientMechanism) -> None:
    """Refuse one noised change more than the recipe promises or the policy allows. A round that is repeated
    has other noise, and counts again: a masked change too, since the others can open its sum without this
    site.

    Raises:
        PolicyError: names the key, what was spent, and what is allowed.
    """
    release, turns = turn_of(mechanism), mechanism.participation.turns
    own = [each for each in ledger.releases(run) if each.unit == "client"]
    done = sum(each.steps for each in own)
    if epsilon_of([*own, release]) > mechanism.epsilon(mechanism.participation.rounds, 0) * (1 + ROUNDING):
        raise PolicyError(
            f"privacy.epsilon: {done} noised changes of this run were sent from here, and the recipe's "
            f"promise is for {turns}"
        )
    before = [each for each in ledger.releases() if each.unit == "client"]
    spent = epsilon_of([*before, release])
    if policy.max_epsilon is not None and spent > policy.max_epsilon * (1 + ROUNDING):
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: one change more would spend {spent:.4g} in all runs "
            "together"
        )


def fresh_key(recipe: Recipe, client: str) -> NoiseKey:
    """The key of one change's noise: another one each time, which nobody keeps."""
    assert recipe.privacy is not None
    return NoiseKey.fresh() if recipe.privacy.is_valid else NoiseKey.seeded(recipe.seed).of(client)


def releases_of(mechanism: ExampleMechanism, wanted: Releases) -> list[Release]:
    """What these noised releases are in the site's ledger."""
    return [
        Release(
            noise_multiplier=event.noise_multiplier,
            sampling=event.sampling,
            delta=mechanism.delta,
            steps=event.count,
        )
        for event in mechanism.events(wanted)
    ]


def check_spending(
    policy: PolicySettings, ledger: Ledger, run: str, mechanism: ExampleMechanism, wanted: Releases
) -> None:
    """Refuse noised releases beyond what the recipe promises or the policy allows. Those that were made
    before count even where the run went back to an earlier round and asks for them again.

    Raises:
        PolicyError: names the key, what was spent, and what is asked for.
    """
    more = releases_of(mechanism, wanted)
    own = [each for each in ledger.releases(run) if each.unit == "example"]
    promised = mechanism.planned_epsilon
    done, asked = (sum(each.steps for each in releases) for releases in (own, more))
    kind = "noised steps" if mechanism.head_noise is None else "noised steps and sums for the head"
    if (spent := epsilon_of([*own, *more])) > promised * (1 + ROUNDING):
        raise PolicyError(
            f"privacy.epsilon: {done} {kind} of this run were made here, and {asked} more would spend "
            f"{spent:.4g} in all; the recipe promises {promised:.4g}"
        )
    if policy.max_epsilon is None:
        return
    known = [each for each in ledger.releases() if each.unit == "example"]
    if (spent := epsilon_of([*known, *more])) > policy.max_epsilon * (1 + ROUNDING):
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: {asked} more {kind} would spend {spent:.4g} in all "
            "runs together"
        )


def epsilon_of(releases: list[Release]) -> float:
    """What these releases of one unit have spent together, at the least of their deltas."""
    counts: dict[tuple[float, float, bool], int] = {}
    for release in releases:
        key = release.noise_multiplier, release.sampling, release.integers
        counts[key] = counts.get(key, 0) + release.steps
    events = [
        integer_event(noise, count) if integers else Event(noise, count, sampling)
        for (noise, sampling, integers), count in counts.items()
    ]
    delta = min((release.delta for release in releases), default=1.0)
    return Spending.of(events).epsilon(delta)
