"""Privacy at a site: what its policy asks of a recipe's noise, and what noised releases may spend."""

from __future__ import annotations

from ...core.errors import PolicyError
from ...privacy.accounting import Event
from ...privacy.accounting import Ledger as Spending
from ...privacy.example_mechanism import ExampleMechanism, Releases
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
    if policy.max_epsilon is not None and (privacy is None or unit != "example"):
        raise PolicyError(f"policy.max_epsilon = {policy.max_epsilon}: {said}; allowed: 'example'")
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
    if mechanism.noise_multiplier < policy.minimum_noise:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: for this site's rows privacy.epsilon = "
            f"{mechanism.settings.epsilon} takes noise of {mechanism.noise_multiplier:.4g}"
        )
    if mechanism.head_noise is not None and mechanism.head_noise < policy.minimum_noise:
        raise PolicyError(
            f"policy.minimum_noise = {policy.minimum_noise}: sums for the head have noise of "
            f"{mechanism.head_noise:.4g} by privacy.head_share = {mechanism.settings.head_share}"
        )


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
    own, promised = ledger.releases(run), mechanism.planned_epsilon
    done, asked = (sum(each.steps for each in releases) for releases in (own, more))
    kind = "noised steps" if mechanism.head_noise is None else "noised steps and sums for the head"
    if (spent := epsilon_of([*own, *more])) > promised * (1 + ROUNDING):
        raise PolicyError(
            f"privacy.epsilon: {done} {kind} of this run were made here, and {asked} more would spend "
            f"{spent:.4g} in all; the recipe promises {promised:.4g}"
        )
    if policy.max_epsilon is None:
        return
    if (spent := epsilon_of([*ledger.releases(), *more])) > policy.max_epsilon * (1 + ROUNDING):
        raise PolicyError(
            f"policy.max_epsilon = {policy.max_epsilon}: {asked} more {kind} would spend {spent:.4g} in all "
            "runs together"
        )


def epsilon_of(releases: list[Release]) -> float:
    """What these releases have spent together, at the least of their deltas."""
    counts: dict[tuple[float, float], int] = {}
    for release in releases:
        key = release.noise_multiplier, release.sampling
        counts[key] = counts.get(key, 0) + release.steps
    events = [Event(noise, count, sampling) for (noise, sampling), count in counts.items()]
    delta = min((release.delta for release in releases), default=1.0)
    return Spending.of(events).epsilon(delta)
