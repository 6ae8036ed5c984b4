"""What a simulation's clients work with: their data, the base model, and the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..data.build import build_data, check_first_rows, with_builtin_columns
from ..data.examples import ClientData, FederatedData
from ..data.settings import DataSettings
from ..methods import Method
from ..methods.tuning.release import OwnNoise
from ..recipe.recipe import Recipe
from ..simulation.poison import poisoned, with_noise
from ..updates.attack import hostile_clients
from .base_model import load_for
from .build import check_cohort, check_fit, make_method, pooled
from .example_run import check_rows
from .truncation import fitted_rows


@dataclass(frozen=True)
class ReadData:
    """The data as they were read, and the settings by which they were."""

    settings: DataSettings
    data: FederatedData


def read_data(recipe: Recipe) -> ReadData:
    """The data of a complete recipe.

    Raises:
        RecipeError, DataError, ModelError: they cannot be read, or do not fit the recipe or the model.
    """
    settings, clients = with_builtin_columns(recipe.data, recipe.clients)
    check_first_rows(settings, clients)
    check_fit(recipe)
    data = build_data(settings, clients, recipe.seed, recipe.public)
    check_cohort(recipe, data)
    check_rows(recipe, data)
    return ReadData(settings, data)


@dataclass(frozen=True)
class ClientSide:
    """What a worker has: the method on its own base model, and the clients' data by name."""

    method: Method
    clients: Mapping[str, ClientData]


def client_side(recipe: Recipe, read: ReadData, own_noise: OwnNoise | None) -> ClientSide:
    """The clients' side of a simulation, as :func:`~.simulation.simulate` makes it, without what only a
    server needs. ``own_noise`` is how each client noises its change, where it does.

    Raises:
        RecipeError, DataError, ModelError: as there.
    """
    base = load_for(recipe, read.data.task)
    data = fitted_rows(read.settings, base, read.data)
    method = make_method(recipe, base, data, own_noise=own_noise)
    return ClientSide(method, owners(recipe, damaged(recipe, data)))


def damaged(recipe: Recipe, data: FederatedData) -> FederatedData:
    """The data with the mistakes and the malice that the recipe asks for in what clients train on."""
    clients, labels = data.clients, data.task.labels
    if recipe.noise.labels:
        clients = with_noise(clients, recipe.noise, len(labels), recipe.seed)
    hostile = hostile_clients(list(data.clients), recipe.attack, recipe.seed)
    return replace(data, clients=poisoned(clients, recipe.attack, hostile, labels, recipe.seed))


def owners(recipe: Recipe, data: FederatedData) -> Mapping[str, ClientData]:
    """Who trains: each client, or of the centralised baseline one that holds everybody's data."""
    return pooled(data) if recipe.baseline == "centralised" else data.clients
