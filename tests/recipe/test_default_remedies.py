"""What a recipe gets that says nothing of label skew."""

from __future__ import annotations

import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

import fedcustom
from fedcustom.cli.progress_bar import ProgressDisplay
from fedcustom.core.errors import RecipeError
from fedcustom.federated.resolve import resolved
from fedcustom.models.configuration import LINEAR_HEADS
from fedcustom.recipe.label_skew import in_words
from fedcustom.recipe.recipe import Recipe, load_recipe, to_toml
from helpers.runs import rows_of, tensors_of

ON, OFF = (1.0, [1, -1]), (0.0, [])


def found(small: dict[str, Any], overrides: dict[str, Any]) -> tuple[float | None, list[int] | None]:
    """The completed recipe's two settings; ``method`` is taken as a table."""
    given = {**small, "method": overrides.get("method", small["method"])}
    single = {key: value for key, value in overrides.items() if key != "method"}
    training = resolved(load_recipe(given, single)).training
    return training.logit_adjustment, training.fit_head_rounds


@pytest.mark.parametrize("method", ["prefix", "lora", "soft_prompt", "full", "adapter", "ia3", "bitfit"])
def test_every_method_that_tunes_a_classifier_has_them(small: dict[str, Any], method: str) -> None:
    """So that a comparison of methods compares methods."""
    assert found(small, {"method": {"name": method}, "rounds.count": 5}) == ON


@pytest.mark.parametrize(
    "overrides",
    [
        {"rounds.count": 4},
        {"aggregation.rule": "multi_krum"},
        {"aggregation.rule": "fednova"},
        {"aggregation.correction": "feddyn"},
        {"participation.buffer": 2},
        {"personalisation.keep": ["prefix"]},
        {"attack.kind": "sign_flip", "attack.fraction": 0.3},
        {"method": {"name": "lora", "variant": "fedsa"}},
        {"method": {"name": "lora", "variant": "rolora"}},
        {"method": {"name": "lora", "private_rank": 2}},
        {"method": {"name": "lora", "variant": "hetlora", "client_ranks": [2, 4]}},
        {"training.freeze_head_rounds": 1},
        {"participation.dropout": 0.3},
        {"model.trust_remote_code": True},
        {"model.base": "no/such-folder"},
    ],
)
def test_they_are_off_where_they_have_no_place(small: dict[str, Any], overrides: dict[str, Any]) -> None:
    assert found(small, {"rounds.count": 6, **overrides}) == OFF


@pytest.mark.parametrize("baseline", ["centralised", "local"])
def test_baselines_have_the_fits_alone(small: dict[str, Any], baseline: str) -> None:
    """So that they differ from a federated run in what is shared, and not in how the head comes about; there
    is no skew between clients for logits to be adjusted by.
    """
    base = {"baseline": baseline, "rounds.count": 6}
    assert found(small, base) == (0.0, [1, -1])
    for off in ({"training.freeze_head_rounds": 1}, {"rounds.count": 4}, {"training.fit_head_rounds": []}):
        assert found(small, {**base, **off}) == OFF


@pytest.mark.parametrize("said", [{}, {"training.fit_head_rounds": []}, {"training.logit_adjustment": 1.0}])
def test_a_probe_is_a_fit_and_nothing_else(small: dict[str, Any], said: dict[str, Any]) -> None:
    probe = {**small, "method": {"name": "probe"}}
    for baseline in ("federated", "centralised", "local"):
        complete = resolved(load_recipe(probe, {"baseline": baseline, **said}))
        training = complete.training
        assert (training.logit_adjustment, training.fit_head_rounds) == (0.0, [1])
        assert complete.rounds.count == 1
        most = 100 if baseline == "federated" else None  # of clients whose number is not known yet
        assert training.fit_head_clients == most
        assert complete.settled(4).training.fit_head_clients is None
    some = resolved(load_recipe(probe, {"training.fit_head_clients": 3})).settled(9)
    withheld = "labels of which a client has fewer than 3 texts are withheld from the fit"
    assert in_words(some) == f"3 clients fit the head in round 1; {withheld}"


def test_what_is_said_holds(small: dict[str, Any]) -> None:
    """And one of the two that is set turns the other off."""
    base = {"rounds.count": 6}
    assert found(small, {**base, "training.logit_adjustment": 0.0}) == OFF
    assert found(small, {**base, "training.fit_head_rounds": []}) == OFF
    assert found(small, {**base, "training.logit_adjustment": 0.5}) == (0.5, [])
    assert found(small, {**base, "training.fit_head_rounds": [2]}) == (0.0, [2])


def test_decoders_have_none(tiny: dict[str, str], small: dict[str, Any]) -> None:
    """Their heads have no bias."""
    assert found(small, {"model.base": tiny["llama"], "rounds.count": 6}) == OFF


def test_a_run_by_default_is_the_run_with_them(
    tmp_path: Path, tiny: dict[str, str], small: dict[str, Any]
) -> None:
    base = {"model.base": tiny["bert"], "rounds.count": 5, "rounds.clients_per_round": 2}
    said = {"training.logit_adjustment": 1.0, "training.fit_head_rounds": [1, -1]}
    runs = {"default": {}, "said": said, "off": {"training.logit_adjustment": 0.0}}
    scores = {}
    for name, more in runs.items():
        fedcustom.run(small, overrides={**base, **more}, out=tmp_path / name)
        scores[name] = [row["development"] for row in rows_of(tmp_path / name) if row.get("development")]
    assert scores["default"] == scores["said"] != scores["off"]
    assert [len(row["cohort"]) for row in rows_of(tmp_path / "default")[1:]] == [4, 2, 2, 2, 4]


def test_progress_says_which_rounds_fit_the_head(small: dict[str, Any]) -> None:
    written = StringIO()
    display = ProgressDisplay(Console(file=written, width=100))
    display.on_run_start(resolved(load_recipe(small, {"rounds.count": 5})), 0, Path())
    kept = "not fitted: 1 of 4 clients answered"
    for row in ({"round": 1}, {"round": 5, "train_loss": None, "method": {"head": kept}}):
        display.on_round_end(row)
    assert "head fitted" in written.getvalue()
    assert f"head {kept}" in written.getvalue()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {},
            "all clients fit the head in rounds 1, 5, and it rests otherwise; logits are adjusted by each "
            "client's labels; labels of which a client has fewer than 3 texts are withheld from the fit",
        ),
        (
            {"training.fit_head_least_texts": 1, "rounds.selection": "balanced"},
            "all clients fit the head in rounds 1, 5, and it rests otherwise; cohorts have nearly "
            "everybody's labels, and clients as many batches as each other; labels of which a client has a "
            "single text take part in the fit",
        ),
        (
            {"rounds.selection": "balanced"},
            "all clients fit the head in rounds 1, 5, and it rests otherwise; cohorts have nearly "
            "everybody's labels, and clients as many batches as each other; "
            "labels of which a client has fewer than 3 texts are withheld from the fit",
        ),
        (
            {"training.fit_head_rounds": [1], "training.freeze_head_rounds": 0},
            "all clients fit the head in round 1; "
            "labels of which a client has fewer than 3 texts are withheld from the fit",
        ),
        *(
            (
                {"training.fit_head_rounds": [1], "privacy": privacy},
                "all clients fit the head in round 1, and it rests otherwise; "
                "the sums of the fit are noised, and no label is withheld",
            )
            for privacy in (
                {"unit": "client", "epsilon": 8.0, "delta": 1e-3},
                {"unit": "example", "epsilon": 8.0, "delta": 1e-3},
            )
        ),
        ({"training.logit_adjustment": 0.5}, "logits are adjusted by each client's labels"),
        ({"training.logit_adjustment": 0}, None),
        (
            {"baseline": "centralised", "rounds.selection": "balanced"},
            "all data fits the head in rounds 1, 5, and it rests otherwise",
        ),
        ({"baseline": "centralised", "training.fit_head_rounds": []}, None),
    ],
)
def test_in_words(small: dict[str, Any], overrides: dict[str, Any], said: str | None) -> None:
    recipe = resolved(load_recipe(small, {"rounds.count": 5, **overrides}))
    assert in_words(recipe.settled(100)) == said


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_says_what_is_done_against_label_skew(small: dict[str, Any], quiet: bool) -> None:
    written = StringIO()
    recipe = resolved(load_recipe(small, {"rounds.count": 5})).settled(4)
    ProgressDisplay(Console(file=written, width=200), quiet=quiet).on_run_start(recipe, 0, Path())
    said = "federated prefix: against label skew, all clients fit the head in rounds 1, 5, and it rests"
    assert (said in written.getvalue()) != quiet


def test_asking_everybody_twice_is_little_beside_training(small: dict[str, Any]) -> None:
    many = {"clients.partition": "iid", "clients.count": 9, "rounds.count": 6}
    assert found(small, {**many, "rounds.clients_per_round": 3}) == ON
    assert found(small, many) == ON


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize(
    ("count", "cohort", "rounds", "asked"),
    [
        (200, 10, 40, None),  # all twice are as many as train
        (201, 10, 40, 200),
        (1000, 10, 40, 200),
        (1000, 10, 20, 100),
        (1000, 9, 20, 100),  # half as many as train, or 100
        (100, 10, 6, None),
        (101, 10, 6, 100),
        (10, 3, 6, None),
    ],
)
def test_of_very_many_clients_some_fit_the_head(
    small: dict[str, Any], partition: str, count: int, cohort: int, rounds: int, asked: int | None
) -> None:
    """A hundred at least, or as many in both rounds together as train in all; nobody draws balanced cohorts
    then, nor does a cohort that is small.
    """
    base = {"clients.partition": partition, "clients.count": count, "rounds.count": rounds}
    given = load_recipe(small, {**base, "rounds.clients_per_round": cohort})
    complete = resolved(given)
    training = complete.training
    assert (training.fit_head_rounds, training.fit_head_clients) == ([1, -1], asked)
    balanced = asked is None and cohort >= 10
    assert training.logit_adjustment == (0.0 if balanced else 1.0)
    assert complete.rounds.selection == ("balanced" if balanced else None)
    said = f"{asked or 'all'} clients fit the head in rounds 1, {rounds}, and it rests otherwise; "
    assert str(in_words(complete)).startswith(said)
    assert resolved(load_recipe(tomllib.loads(to_toml(complete)))) == complete


def test_how_many_fit_the_head_is_for_the_recipe_to_say(small: dict[str, Any]) -> None:
    """More than by default, too; what turns the fits off turns this off, and baselines have no use for it."""
    base = {"clients.partition": "iid", "clients.count": 1000, "rounds.count": 40}
    base |= {"rounds.clients_per_round": 10, "training.fit_head_clients": 300}

    def asked(**more: Any) -> tuple[list[int] | None, int | None]:
        training = resolved(load_recipe(small, {**base, **more})).training
        return training.fit_head_rounds, training.fit_head_clients

    assert asked() == asked(**{"training.fit_head_rounds": [1, -1]}) == ([1, -1], 300)
    assert asked(**{"clients.count": 100}) == ([1, -1], 300)
    assert (
        asked(**{"training.fit_head_rounds": []}) == asked(**{"training.logit_adjustment": 0}) == ([], None)
    )
    assert asked(baseline="local") == ([1, -1], None)
    assert asked(**{"baseline": "local", "training.fit_head_rounds": [1, -1]}) == ([1, -1], None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rounds.count": 2}, r"fit_head_clients = 3: no head is fitted by default here; say in which"),
        ({"participation.dropout": 0.3}, "fit_head_clients = 3: no head is fitted by default here"),
        ({"rounds.selection": "balanced"}, "needs all clients to tell of their labels"),
        ({"training.fit_head_rounds": [1], "rounds.selection": "balanced"}, "leave one of the two unset"),
        ({"training.fit_head_clients": 1}, "greater than or equal to 2"),
    ],
)
def test_what_a_fit_to_some_clients_needs(
    small: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        resolved(load_recipe(small, {"rounds.count": 9, "training.fit_head_clients": 3, **overrides}))


def test_cohorts_of_very_many_clients_are_balanced_where_asked(
    small: dict[str, Any],
) -> None:
    base = {"clients.partition": "iid", "clients.count": 1000, "rounds.count": 40}
    more = {**base, "rounds.clients_per_round": 10, "rounds.selection": "balanced"}
    with pytest.raises(RecipeError, match="needs all clients to tell of their labels"):
        resolved(load_recipe(small, {**more, "training.fit_head_clients": 200}))
    complete = resolved(load_recipe(small, more))
    assert complete.rounds.selection == "balanced"
    assert complete.training.fit_head_clients is None
    more["training.fit_head_rounds"] = [1, -1]
    assert resolved(load_recipe(small, more)).rounds.selection == "balanced"


def test_a_run_with_a_head_fitted_to_some_clients(small: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after its first fit it goes on as if it had not been. It asks no more than there are."""
    said = {"training.fit_head_rounds": [1, -1], "training.logit_adjustment": 1.0, "rounds.count": 4}
    some = {**said, "training.fit_head_clients": 2, "rounds.clients_per_round": 3}
    whole = fedcustom.run(small, some, out=tmp_path / "whole")
    assert [len(row["cohort"]) for row in rows_of(whole.directory)[1:]] == [2, 3, 3, 2]

    class Interrupted(Exception):
        pass

    class Stop(fedcustom.federated.callbacks.Callback):
        def on_round_end(self, row: Any) -> None:
            if row["round"] == 2:
                raise Interrupted

    with pytest.raises(Interrupted):
        fedcustom.run(small, some, out=tmp_path / "half", callbacks=[Stop()])
    again = fedcustom.run(small, some, out=tmp_path / "half", resume=True)
    ours, theirs = tensors_of(whole.directory), tensors_of(again.directory)
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    all_four = {**said, "training.fit_head_clients": 9}
    heads = [
        tensors_of(fedcustom.run(small, more, out=tmp_path / name).directory)
        for name, more in (("nine", all_four), ("all", said))
    ]
    assert all((heads[0][name] == heads[1][name]).all() for name in heads[0])


@pytest.mark.parametrize(
    ("overrides", "adjustment", "selection"),
    [
        ({}, 0.0, "balanced"),
        ({"clients.partition": "iid", "clients.count": 20}, 0.0, "balanced"),
        ({"rounds.selection": "balanced"}, 0.0, "balanced"),
        ({"rounds.selection": "uniform"}, 1.0, "uniform"),
        ({"rounds.clients_per_round": None}, 1.0, None),
        ({"rounds.clients_per_round": 9}, 1.0, None),
        ({"rounds.clients_per_round": 9, "rounds.selection": "balanced"}, 0.0, "balanced"),
        ({"clients.partition": "iid", "clients.count": 19}, 1.0, None),
        ({"clients.partition": "iid", "clients.count": 10}, 0.0, "balanced"),  # nobody is left out
        (
            {"clients.partition": "iid", "clients.count": 10, "rounds.clients_per_round": None},
            0.0,
            "balanced",
        ),
        ({"clients.partition": "iid", "clients.count": 9, "rounds.clients_per_round": None}, 1.0, None),
        ({"participation.partial": 0.5}, 1.0, None),
        ({"training.prior_count": 0.5}, 1.0, None),
        ({"training.logit_adjustment": 0.0}, 0.0, None),
        ({"training.fit_head_rounds": [1]}, 0.0, None),
        ({"training.fit_head_rounds": [1], "rounds.selection": "balanced"}, 0.0, "balanced"),
        ({"baseline": "centralised", "training.prior_count": 0.5}, 0.0, None),
        ({"baseline": "centralised", "rounds.selection": "balanced"}, 0.0, "balanced"),
    ],
)
def test_balanced_cohorts_take_the_place_of_the_adjustment(
    small: dict[str, Any], overrides: dict[str, Any], adjustment: float, selection: str | None
) -> None:
    """Where cohorts are large, and nobody says otherwise. What was completed reads as it is."""
    base = {"rounds.count": 6, "rounds.clients_per_round": 10}
    given = load_recipe(small, {k: v for k, v in {**base, **overrides}.items() if v is not None})
    complete = resolved(given)
    assert (complete.training.logit_adjustment, complete.rounds.selection) == (adjustment, selection)
    assert resolved(load_recipe(tomllib.loads(to_toml(complete)))) == complete


@pytest.mark.parametrize("kind", sorted(LINEAR_HEADS))
def test_heads_that_are_fitted_by_default_can_be(kind: str) -> None:
    """Their last layer has a bias, and one vector for each text."""
    configuration = transformers.AutoConfig.for_model(
        kind, hidden_size=32, dim=32, embedding_size=32, input_embedding_size=32, output_embedding_size=32,
        num_hidden_layers=2, n_layers=2, num_attention_heads=4, n_heads=4, intermediate_size=48,
        hidden_dim=48, vocab_size=100, max_position_embeddings=64, pad_token_id=0,
        type_vocab_size=2, num_labels=3,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(configuration).eval()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 3]
    shapes = []
    layers[-1].register_forward_pre_hook(lambda layer, given: shapes.append(given[0].shape))
    ids = torch.arange(5, 65).view(4, 15)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert layers[-1].bias is not None
    assert shapes == [(4, 32)]
    assert logits.shape == (4, 3)


def test_a_run_sends_in_training_what_it_sends_without_them(small: dict[str, Any], tmp_path: Path) -> None:
    """The bytes a client and round are those of rounds that train; the totals have all."""
    sent = {}
    for name, more in (
        ("on", {"training.freeze_head_rounds": 0}),
        ("off", {"training.logit_adjustment": 0.0}),
    ):
        run = fedcustom.run(small, {"rounds.count": 5, **more}, out=tmp_path / name)
        sent[name] = run.summary["bytes"]
        rows = rows_of(tmp_path / name)[1:]
        assert sent[name]["up_total"] == sum(sum(row["bytes_up"].values()) for row in rows)
    assert sent["on"]["up_per_client_round"] == pytest.approx(sent["off"]["up_per_client_round"], rel=0.01)
    assert sent["on"]["up_total"] != sent["off"]["up_total"]


def test_a_complete_recipe_of_a_method_without_training_is_one(small: dict[str, Any]) -> None:
    """Those of older runs say 0 and [] where nothing is said now."""
    given = {**small, "method": {"name": "prompt_engineering"}, "training": {}}
    off = {"training.logit_adjustment": 0.0, "training.fit_head_rounds": []}
    assert resolved(load_recipe(given, off)).training.logit_adjustment == 0.0
    with pytest.raises(RecipeError, match="has no meaning"):
        load_recipe(given, {"training.logit_adjustment": 1.0})


# --- natural clients, whose number is known only when their data is ---


def natural(small: dict[str, Any], **overrides: Any) -> Recipe:
    return load_recipe(small, {"rounds.count": 20, **{k.replace("__", "."): v for k, v in overrides.items()}})


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ({}, 500),  # half of 20 rounds of 50
        ({"rounds__clients_per_round": 30}, 300),
        ({"rounds__clients_per_round": 9}, 100),  # never fewer
        ({"rounds__min_clients": 80}, 800),
        ({"rounds__selection": "balanced"}, None),  # needs all of them
        ({"training__fit_head_clients": 7}, 7),
    ],
)
def test_so_many_natural_clients_fit_the_head_at_most(
    small: dict[str, Any], overrides: dict[str, Any], most: int | None
) -> None:
    complete = resolved(natural(small, **overrides))
    assert complete.training.fit_head_clients == most
    assert complete.training.fit_head_rounds == [1, -1]
    assert resolved(load_recipe(tomllib.loads(to_toml(complete)))) == complete


def test_natural_clients_are_balanced_while_all_of_them_tell_of_their_labels(small: dict[str, Any]) -> None:
    """Settled alike by everybody who knows how many there are, once or twice; where they are not, the logits
    are adjusted, as the default is elsewhere.
    """
    complete = resolved(natural(small, rounds__clients_per_round=30))
    few, many = complete.settled(300), complete.settled(301)
    assert (complete.rounds.selection, complete.training.logit_adjustment) == ("balanced", 0.0)
    assert (few.rounds.selection, few.training.logit_adjustment) == ("balanced", 0.0)
    assert (many.rounds.selection, many.training.logit_adjustment) == ("uniform", 1.0)
    assert "in rounds 1, 20, and it rests otherwise; cohorts have nearly" in str(in_words(few))
    assert in_words(many) == (
        "300 clients fit the head in rounds 1, 20, and it rests otherwise; logits are adjusted by each "
        "client's labels; labels of which a client has fewer than 3 texts are withheld from the fit"
    )
    assert few.settled(300) == few
    assert many.settled(301) == many
    asked = resolved(natural(small, rounds__clients_per_round=30, rounds__selection="balanced"))
    assert asked.settled(10_000) == asked  # whoever asks for balance gets it, and all are asked


def test_recipes_that_count_their_clients_are_settled_already(small: dict[str, Any]) -> None:
    for more in ({"clients__count": 1000, "rounds__clients_per_round": 10}, {"clients__count": 40}):
        complete = resolved(natural(small, clients__partition="iid", **more))
        assert complete.settled(complete.clients.count) == complete


@pytest.mark.parametrize(
    ("overrides", "clients", "cohort"),
    [
        ({}, 4, 4),
        ({}, 50, 50),
        ({}, 5000, 50),
        ({"rounds__min_clients": 80}, 5000, 80),
        ({"rounds__min_clients": 80}, 60, 60),
        ({"rounds__clients_per_round": 7}, 5000, 7),
        ({"rounds__clients_per_round": 200}, 5000, 200),
    ],
)
def test_a_cohort_by_default(
    small: dict[str, Any], overrides: dict[str, Any], clients: int, cohort: int
) -> None:
    rounds = natural(small, **overrides).rounds
    assert rounds.cohort(clients) == cohort


def test_counted_clients_in_cohorts_by_default_are_asked_as_natural_ones_are(small: dict[str, Any]) -> None:
    """1,000 of them, 50 a round over 20 rounds: 500 fit the head."""
    complete = resolved(natural(small, clients__partition="iid", clients__count=1000))
    assert complete.training.fit_head_clients == 500
    assert complete.rounds.selection is None
    everybody = resolved(natural(small, clients__partition="iid", clients__count=500))
    assert everybody.training.fit_head_clients is None
    assert everybody.rounds.selection == "balanced"
