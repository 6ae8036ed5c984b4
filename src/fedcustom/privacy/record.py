"""The record of a guarantee: what ``privacy.json`` in a run's directory says."""

from __future__ import annotations

from typing import Any

from .accounting import Guarantee
from .client_mechanism import ClientMechanism
from .sum_noise import SCALE

NEVER_PROMISED = (
    "rows of the development and test splits, metrics, losses and norms by client, and predictions",
    "names of labels and clients, numbers of rows, and who takes part where that is public",
    "timing, and lengths of messages",
    "the base model, and what it was trained on",
)
"""What no guarantee here covers."""


def record(guarantee: Guarantee, **details: Any) -> dict[str, Any]:
    """What stands in ``privacy.json``: the guarantee, what is never promised, and the ``details``."""
    return {
        "unit": guarantee.unit,
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "valid": guarantee.valid,
        "assumptions": list(guarantee.assumptions),
        "never_promised": list(NEVER_PROMISED),
        **details,
    }


def client_record(mechanism: ClientMechanism) -> dict[str, Any]:
    """The record of a run with ``unit = "client"``, with all that is needed to check it: JSON values."""
    settings, participation = mechanism.settings, mechanism.participation
    by_clients: dict[str, Any] = {}
    if mechanism.terms is not None:
        by_clients = {
            "colluding": mechanism.terms.colluding,
            "integer_norm": SCALE,
            "epsilon_if_normal": mechanism.gaussian_epsilon(),
        }
    return record(
        mechanism.guarantee(),
        noise=settings.place,
        randomness=settings.randomness,
        neighbours="one client's contributions replaced by zeros",
        noise_multiplier=mechanism.noise_multiplier,
        last_state_noise=mechanism.last_state_noise,
        clip=settings.clip,
        clip_head=settings.clip_head,
        head={"fits": mechanism.head_fits, "noise_multiplier": mechanism.head_noise},
        participation={
            "kind": settings.participation,
            "clients": participation.clients,
            "groups": participation.groups,
            "probability": participation.probability,
            "training_rounds": participation.rounds,
            "turns": participation.turns,
        },
        coefficients=list(mechanism.coefficients),
        against=list(mechanism.against),
        **by_clients,
    )
