"""Federated customisation of large pretrained models: the public names of the Python interface.

import fedcustom
run = fedcustom.run("recipes/docstrings.toml", {"rounds.count": 5})
run.summary["metrics"], run.history, run.model(), run.predict(["number of rows"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.finished_run import Run
    from .api.running import load, run
    from .core.errors import FedcustomError
    from .federated.callbacks import Callback
    from .preflight.recipe_check import check
    from .preflight.report import RecipeCheck
    from .proposal.propose import propose
    from .recipe.recipe import Recipe, load_recipe
    from .trainers.federate import FederatedTrainer, federate

__all__ = [
    "Callback",
    "FedcustomError",
    "FederatedTrainer",
    "Recipe",
    "RecipeCheck",
    "Run",
    "check",
    "federate",
    "load",
    "load_recipe",
    "propose",
    "run",
]

_HOMES = {
    "Run": "api.finished_run",
    "load": "api.running",
    "run": "api.running",
    "Callback": "federated.callbacks",
    "FedcustomError": "core.errors",
    "Recipe": "recipe",
    "RecipeCheck": "preflight.report",
    "check": "preflight.recipe_check",
    "propose": "proposal.propose",
    "load_recipe": "recipe",
    "FederatedTrainer": "trainers.federate",
    "federate": "trainers.federate",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, and ``fedcustom --help`` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcustom' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
