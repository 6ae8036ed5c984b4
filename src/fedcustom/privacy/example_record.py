"""The record and the words of a guarantee for single rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import Any

from .accounting import Guarantee
from .example_mechanism import ASSUMPTIONS, ROW_NORM, ExampleMechanism, Releases, delta_of
from .record import NEVER_PROMISED, record
from .settings import PrivacySettings


def example_record(
    settings: PrivacySettings, mechanisms: Mapping[str, ExampleMechanism], done: Mapping[str, Releases]
) -> dict[str, Any]:
    """What stands in ``privacy.json`` of a run with ``unit = "example"``: JSON values.

    Args:
        settings: The recipe's section.
        mechanisms: Those of the clients, by name; none across sites, whose noise is their own.
        done: What clients have released so far.
    """
    nothing = Releases()
    clients = {
        name: {
            "rows": mechanism.rows,
            "sampling": mechanism.rate,
            "noise_multiplier": mechanism.noise_multiplier,
            "planned_steps": mechanism.planned.steps,
            "steps": done.get(name, nothing).steps,
            **_head(mechanism, done.get(name, nothing)),
            "planned_epsilon": mechanism.planned_epsilon,
            "epsilon": mechanism.epsilon(done.get(name, nothing)),
        }
        for name, mechanism in mechanisms.items()
    }
    guarantee = example_guarantee(settings, mechanisms)
    return record(
        guarantee,
        epsilon=guarantee.epsilon if math.isfinite(guarantee.epsilon) else None,  # each site knows its own
        noise=settings.place,
        randomness=settings.randomness,
        neighbours="one training row's gradients, and its part in sums for a head, replaced by zeros",
        clip=settings.clip,
        clip_head=settings.clip_head,
        withheld=["training losses"],
        over_clients={
            key: _spread(float(client[key]) for client in clients.values())
            for key in ("planned_epsilon", "epsilon", "noise_multiplier", "rows")
        },
        clients=clients,
    )


def example_words(
    settings: PrivacySettings, mechanisms: Mapping[str, ExampleMechanism]
) -> Iterator[tuple[str, str]]:
    """Headings and sentences on a run with ``unit = "example"``."""
    guarantee = example_guarantee(settings, mechanisms)
    factor = math.exp(min(guarantee.epsilon, 700.0))
    yield (
        "promise",
        f"epsilon {guarantee.epsilon:.4g}, delta {guarantee.delta:g}, for each training row of each client: "
        f"whatever anybody, the server too, makes of what a client sends is at most {factor:,.4g} times as "
        f"likely as without that row, and at least a {factor:,.4g}th, up to {guarantee.delta:g}",
    )
    if not guarantee.valid:
        yield "NOT VALID", "privacy.randomness = 'seeded': everybody can compute the noise and subtract it"
    clips = " and ".join(
        f"{group} {'scaled to norm 1' if kind == 'unit' else f'clipped to {kind:g}'}"
        for group, kind in (("tensors", settings.clip), ("head", settings.clip_head))
        if kind != "adaptive"
    )
    noise = [mechanism.noise_multiplier for mechanism in mechanisms.values()]
    yield (
        "mechanism",
        f"each step draws every row by itself; its gradient's {clips}; noise of {_range(noise)} times the "
        "bound, made by each client; sums are divided by the rows of a batch on average",
    )
    yield (
        "clients",
        f"{len(mechanisms)}, of {_range([m.rows for m in mechanisms.values()])} rows, in "
        f"{_range([m.planned.steps for m in mechanisms.values()])} steps, each row in one step with "
        f"probability {_range([m.rate for m in mechanisms.values()])}",
    )
    if heads := [m.head_noise for m in mechanisms.values() if m.head_noise is not None]:
        yield (
            "head",
            "before training each client sends counts and sums of vectors of length 1 by label once, with "
            f"noise of {_range(z * ROW_NORM for z in heads)} in each number, made by the client; a row moves "
            f"them by {ROW_NORM:.4g}, so that this alone has epsilon {_range(_of_head(mechanisms))}",
        )
    most = [m.noise_multiplier * math.sqrt(1000) / m.expected for m in mechanisms.values()]
    yield (
        "noise over signal",
        f"in one step, for 1,000 numbers in one group, if all rows agreed (they never do): {_range(most)}; "
        "it grows with the root of how many numbers are trained",
    )
    for text in guarantee.assumptions:
        yield "assumes", text
    for text in NEVER_PROMISED:
        yield "never promised", text


def example_guarantee(settings: PrivacySettings, mechanisms: Mapping[str, ExampleMechanism]) -> Guarantee:
    """The largest of the clients'; where none is known, what each is calibrated to (infinite: by its own
    rows alone).
    """
    promised = [mechanism.planned_epsilon for mechanism in mechanisms.values()]
    epsilon = max(promised, default=math.inf if settings.epsilon is None else settings.epsilon)
    return Guarantee("example", epsilon, delta_of(settings), settings.is_valid, ASSUMPTIONS)


def _head(mechanism: ExampleMechanism, done: Releases) -> dict[str, float | int]:
    """What the record says of a client's sums for the head; nothing where it sends none."""
    if mechanism.head_noise is None:
        return {}
    return {
        "head_noise_multiplier": mechanism.head_noise,
        "planned_head_fits": mechanism.planned.head_fits,
        "head_fits": done.head_fits,
    }


def _of_head(mechanisms: Mapping[str, ExampleMechanism]) -> list[float]:
    """What the clients' sums for the head spend alone."""
    planned = [(m, Releases(head_fits=m.planned.head_fits)) for m in mechanisms.values()]
    return [mechanism.epsilon(fits) for mechanism, fits in planned if fits]


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    found = sorted(values)
    return {"min": found[0], "median": median(found), "max": found[-1]} if found else None


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = (f"{value:,.4g}" for value in (found[0], found[-1]))
    return low if low == high else f"{low} to {high}"
