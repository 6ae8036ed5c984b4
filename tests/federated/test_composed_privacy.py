"""What several private runs on the same clients promise together."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fedcustom.federated.composed_privacy import composed
from fedcustom.privacy.accounting import gaussian_epsilon, gaussian_mu
from fedcustom.recipe.recipe import Recipe, load_recipe


def private(small: dict[str, Any], seed: int = 0, **changes: Any) -> Recipe:
    values = {
        **small,
        "clients": {"partition": "iid", "count": 40},
        "rounds": {"count": 8, "clients_per_round": 10},
        "privacy": {"unit": "client", "epsilon": 8.0, "delta": 1e-4},
        "seed": seed,
    }
    return load_recipe(values, {key.replace("__", "."): value for key, value in changes.items()})


def lines(*recipes: Recipe) -> list[str]:
    return list(composed(recipes, lambda recipe: recipe.clients.count))


def test_gaussian_releases_compose_by_the_root_of_their_number(small: dict[str, Any]) -> None:
    found = lines(private(small), private(small, method__length=2), private(small, privacy__epsilon=2.0))
    mu = math.sqrt(2 * gaussian_mu(8.0, 1e-4) ** 2 + gaussian_mu(2.0, 1e-4) ** 2)
    (line,) = found
    assert "3 runs on the same clients" in line
    assert "each alone has epsilon 2 or 8" in line
    epsilon = float(re.search(r"compose to epsilon ([\d.]+) at delta 0.0001", line)[1])  # type: ignore[index]
    assert epsilon == pytest.approx(gaussian_epsilon(mu, 1e-4), rel=1e-3)


def test_sampled_releases_and_integers_add(small: dict[str, Any]) -> None:
    """No accountant composes them; each run is calibrated to epsilon 8 from above."""
    many = {"clients__count": 80, "rounds__clients_per_round": 40}
    poisson = private(small, privacy__participation="poisson", **many)
    sums = private(small, privacy__noise="sum", secure_sum__on=True, secure_sum__most_examples=40, **many)
    (line,) = lines(poisson, sums)
    epsilon = float(re.search(r"compose to epsilon ([\d.]+) at delta 0.0002", line)[1])  # type: ignore[index]
    assert 15.9 < epsilon <= 16.0


def test_other_clients_are_apart(small: dict[str, Any]) -> None:
    """By the seed that divides the rows, the division, and runs without privacy."""
    assert lines(private(small)) == []
    assert lines(private(small), private(small, seed=1)) == []
    assert lines(private(small), private(small, clients__partition="dirichlet", clients__alpha=0.5)) == []
    plain = load_recipe({**small, "clients": {"partition": "iid", "count": 40}})
    assert lines(private(small), plain, plain) == []
    assert len(lines(*[private(small, seed=seed) for seed in (0, 0, 1, 1)])) == 2


def test_natural_clients_are_the_same_for_every_seed(small: dict[str, Any]) -> None:
    natural = {"clients__partition": "natural", "clients__column": "site", "clients__count": 40}
    (line,) = lines(*[private(small, seed=seed, **natural) for seed in (0, 1)])
    assert "seed" not in line


def test_epsilons_of_rows_add(small: dict[str, Any]) -> None:
    rows = {"privacy__unit": "example", "privacy__delta": 1e-5}
    (line,) = lines(private(small, **rows), private(small, privacy__epsilon=3.0, **rows))
    assert "add up to epsilon 11 and delta 2e-05 at most" in line


def test_rows_are_the_same_at_whichever_client(small: dict[str, Any]) -> None:
    rows = {"privacy__unit": "example", "privacy__delta": 1e-5}
    more = {"clients__partition": "dirichlet", "clients__alpha": 0.5}
    (line,) = lines(private(small, **rows), private(small, seed=1, **rows), private(small, **rows, **more))
    assert "3 runs on the same rows of" in line
    assert "add up to epsilon 24 and delta 3e-05" in line


def test_models_of_runs_without_privacy_are_not_looked_up(small: dict[str, Any]) -> None:
    absent = load_recipe({**small, "model": {"base": "/nowhere/model"}})
    assert lines(absent, absent) == []


def test_other_lengths_of_texts_are_no_other_clients(small: dict[str, Any]) -> None:
    (line,) = lines(private(small), private(small, data__max_length=16))
    assert "2 runs on the same clients" in line


def test_natural_clients_are_counted_once(small: dict[str, Any]) -> None:
    asked = list[Recipe]()

    def count(recipe: Recipe) -> int:
        asked.append(recipe)
        return 40

    natural = {"clients__partition": "natural", "clients__column": "site"}
    assert len(list(composed([private(small, seed=seed, **natural) for seed in range(5)], count))) == 1
    assert len(asked) == 1, "it reads the data"
