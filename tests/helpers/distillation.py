"""Distillation, put together without a run."""

from __future__ import annotations

from typing import Any

from fedcustom.data.build import build_data
from fedcustom.federated.build import make_method
from fedcustom.federated.resolve import resolved
from fedcustom.methods import Client
from fedcustom.methods.distillation.method import Distillation
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe


def prepared(recipe: dict[str, Any]) -> tuple[Distillation, dict[str, Client]]:
    """The method of a recipe and its clients, as the driver makes them."""
    checked = resolved(load_recipe(recipe))
    data = build_data(checked.data, checked.clients, checked.seed, checked.public)
    method = make_method(checked, load_base(checked.model, data.task, checked.seed), data)
    assert isinstance(method, Distillation)
    return method, {name: Client(name, client) for name, client in data.clients.items()}
