"""The recipe: every setting of a run with type, default, bounds and help, validated before loading."""

from .overrides import merged
from .recipe import (
    Baseline,
    Recipe,
    load_recipe,
    parse_recipe,
    read_toml,
    recorded_recipe,
    to_toml,
)
from .sections import FEDERATED_ONLY

__all__ = [
    "FEDERATED_ONLY",
    "Baseline",
    "Recipe",
    "load_recipe",
    "merged",
    "parse_recipe",
    "read_toml",
    "recorded_recipe",
    "to_toml",
]
