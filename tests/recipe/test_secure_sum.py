"""What secure sums do not go with: each refusal names its setting."""

from __future__ import annotations

from typing import Any

import pytest

from fedcustom.core.errors import RecipeError
from fedcustom.experiment.grid import digest
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe, to_toml
from fedcustom.recipe.secure_sum import check_number

ON = {"secure_sum": {"on": True, "most_examples": 100}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aggregation": {"rule": "median"}}, r"aggregation.rule = 'median': looks at each client's change"),
        ({"aggregation": {"rule": "fednova"}}, r"aggregation.rule = 'fednova': looks at each"),
        ({"aggregation": {"max_norm": 3.0}}, r"aggregation.max_norm = 3.0: is a check of each client's"),
        ({"aggregation": {"max_norm_ratio": 9.0}}, r"aggregation.max_norm_ratio = 9.0: is a check of each"),
        ({"rounds": {"selection": "balanced"}}, r"rounds.selection = 'balanced': is drawn by each"),
        ({"compression": {"kind": "int8"}}, r"compression.kind = 'int8': codes of changes cannot be added"),
        ({"compression": {"kind": "float16", "down": True}}, r"compression.kind = 'float16'"),
        ({"participation": {"buffer": 3}}, r"participation.buffer = 3: takes each client's change"),
        (
            {"method": {"name": "lora", "variant": "hetlora", "client_ranks": [2, 4]}},
            r"method.variant = 'hetlora'",
        ),
        (
            {"method": {"name": "lora", "variant": "flora"}},
            r"method.variant = 'flora': does not send changes",
        ),
        ({"method": {"name": "prefix", "merging": "matched"}}, r"method.merging = 'matched'"),
        ({"method": {"name": "prefix", "kind": "kv", "layers_sent": 1}}, r"method.layers_sent = 1"),
        ({"method": {"name": "distillation"}}, r"method.name = 'distillation': does not send changes"),
        ({"method": {"name": "prompt_engineering"}}, r"method.name = 'prompt_engineering'"),
        ({"method": {"name": "retrieval"}, "data": {"task": "retrieval"}}, r"method.name = 'retrieval'"),
        ({"training": {"learning_rate": "auto"}}, r"training.learning_rate = 'auto': repeats rounds"),
        ({"training": {"label_skew": "balance"}}, r"secure_sum.on = true"),
        ({"baseline": "local"}, r"\[secure_sum\]: needs baseline = 'federated'"),
        ({"secure_sum": {"on": True}}, r"secure_sum.most_examples: is needed to weigh by examples"),
        ({"secure_sum": {"on": True, "most_examples": 0}}, r"secure_sum.most_examples = 0: must be greater"),
        ({"secure_sum": {"on": True, "threshold": 2}}, r"secure_sum.threshold = 2: must be greater"),
        ({"secure_sum": {"on": True, "bound": 0}}, r"secure_sum.bound = 0: must be greater than 0"),
        ({"secure_sum": {"on": True, "treshold": 3}}, r"secure_sum.treshold: unknown.*mean 'threshold'"),
        ({"secure_sum": 3}, r"secure_sum = 3: must be a valid dictionary"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolved(load_recipe({**ON, **values}))


@pytest.mark.parametrize(
    ("clients", "changes", "message"),
    [
        (2, {}, "2 clients take part in a round; 3 to 128 are possible"),
        (129, {"rounds": {"clients_per_round": 129}}, "129 clients take part"),
        (10, {"rounds": {"clients_per_round": 2}}, "2 clients take part"),
        (4, {"secure_sum": {"on": True, "most_examples": 9, "threshold": 5}}, "secure_sum.threshold = 5"),
        (4, {"secure_sum": {"on": True, "most_examples": 9, "colluding": 3}}, "secure_sum.colluding = 3"),
    ],
)
def test_numbers_of_clients(clients: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_number(load_recipe({**ON, **changes}), clients)


def test_what_goes_with_secure_sums() -> None:
    for values in (
        {},
        {"method": {"name": "lora", "variant": "ffa"}},
        {"method": {"name": "lora", "variant": "fedsvd"}},
        {"method": {"name": "full"}, "aggregation": {"server_optimizer": "fedadam"}},
        {"personalisation": {"keep": ["head"]}},
        {"aggregation": {"weighting": "uniform"}, "secure_sum": {"on": True}},
    ):
        found = resolved(load_recipe({**ON, **values}))
        fits = [] if "personalisation" in values else [1, -1]
        assert found.training.fit_head_rounds == fits
        assert found.rounds.selection != "balanced", "which is drawn by each client's labels"
        check_number(found, 4)
    off = {**ON, "secure_sum": {"on": False}, "aggregation": {"rule": "median"}}
    check_number(load_recipe(off), 1)


@pytest.mark.parametrize(
    ("clients", "asked"),
    [(50, None), (100, None), (101, 100), (4000, 128)],
)
def test_how_many_clients_fit_the_head_by_default(clients: int, asked: int | None) -> None:
    """As many as without secure sums, and no more than go into one."""
    values = {
        "clients": {"partition": "iid", "count": clients},
        "rounds": {"count": 40, "clients_per_round": 10},
    }
    values["rounds"]["count"] = 20 if clients == 101 else 40
    found = resolved(load_recipe({**ON, **values}))
    assert found.training.fit_head_rounds == [1, -1]
    assert found.training.fit_head_clients == asked
    check_number(found, clients)
    with pytest.raises(
        RecipeError, match=r"129 clients fit the head; 3 to 128 are possible \(training.fit_head_c"
    ):
        check_number(resolved(load_recipe({**ON, **values, "training": {"fit_head_clients": 129}})), 4000)


def test_a_probe_needs_no_weights() -> None:
    found = resolved(load_recipe({"secure_sum": {"on": True}, "method": {"name": "probe"}}))
    assert found.training.fit_head_rounds == [1]
    check_number(found, 4)
    with pytest.raises(RecipeError, match="2 clients fit the head"):
        check_number(found, 2)


def test_an_absent_section_leaves_digests_as_they_were() -> None:
    assert digest(load_recipe({})) == "053ee29b4dfb"
    assert "secure_sum" not in to_toml(load_recipe({}))
    assert (
        load_recipe(ON, {"secure_sum.threshold": 4}).secure_sum
        == load_recipe({"secure_sum": {"on": True, "most_examples": 100, "threshold": 4}}).secure_sum
    )
