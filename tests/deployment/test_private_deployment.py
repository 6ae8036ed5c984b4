"""What a deployed run needs that hides its clients."""

from __future__ import annotations

import pytest

from fedcustom.core.errors import PolicyError, RecipeError
from fedcustom.data.examples import Example
from fedcustom.deployment.parties import check_private
from fedcustom.deployment.site.policy import check_recipe
from fedcustom.deployment.site.settings import PolicySettings
from fedcustom.recipe.recipe import load_recipe

PRIVATE = load_recipe(
    {
        "clients": {"partition": "natural", "column": "site"},
        "model": {"base": "builtin:minilm"},
        "privacy": {"unit": "client", "epsilon": 8.0, "delta": 1e-3},
    }
)


def test_the_server_evaluates_states_itself() -> None:
    """Sites that evaluated them would have a state before its checkpoint is on the disk."""
    check_private(PRIVATE, [Example("a", label=0)])
    check_private(load_recipe(PRIVATE, ["privacy=unset"]), [])
    with pytest.raises(RecipeError, match=r"data\.development"):
        check_private(PRIVATE, [])


def test_noise_of_the_server_is_none_that_a_site_can_ask_for() -> None:
    with pytest.raises(PolicyError, match="added by the server"):
        check_recipe(PolicySettings(minimum_noise=0.5), PRIVATE)
