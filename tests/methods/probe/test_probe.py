"""The sceptic's baseline: logistic regression on frozen sentence embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import fedcustom
from fedcustom.cli.app import app
from fedcustom.core.errors import RecipeError
from fedcustom.data.build import build_data
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl
from helpers.runs import rows_of, tensors_of

TIGHT: dict[str, Any] = {"training.fit_head_steps": 1000, "evaluation.calibrate": False,
                         "evaluation.untuned": False, "evaluation.select": "last",
                         "training.fit_head_least_texts": 1}  # fmt: skip
"""All of the regression, of all texts: nothing is withheld."""


@pytest.fixture
def probe(small: dict[str, Any], sentence: str) -> dict[str, Any]:
    """Of clients that have few of each other's labels."""
    rest = {key: value for key, value in small.items() if key not in ("rounds", "training")}
    return {
        **rest,
        "model": {"base": sentence},
        "clients": {"partition": "dirichlet", "alpha": 0.3, "count": 4},
        "method": {"name": "probe"},
    }


def head_of(run: fedcustom.Run) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors_of(run.directory).items() if "classifier" in name}


@pytest.mark.parametrize("baseline", ["federated", "centralised"])
def test_the_probe_is_that_of_scikit_learn(probe: dict[str, Any], tmp_path: Path, baseline: str) -> None:
    """However labels are spread: the same regression on sentence-transformers' embeddings of all texts."""
    from sentence_transformers import SentenceTransformer

    run = fedcustom.run(probe, {**TIGHT, "baseline": baseline}, out=tmp_path / "run")
    data = build_data(run.recipe.data, run.recipe.clients, run.recipe.seed)
    train = [example for client in data.clients.values() for example in client.train]
    encoder = SentenceTransformer(probe["model"]["base"], device="cpu")
    x, z = (encoder.encode([e.text for e in part]).astype(float) for part in (train, data.test))
    y = np.array([example.label for example in train])
    theirs = LogisticRegression(C=10.0, tol=1e-12, max_iter=100_000).fit(x, y)
    head = head_of(run)
    weight = head["classifier.weight"].double().numpy()
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-3 * abs(theirs.coef_).max())
    bias = head["classifier.bias"].double().numpy()
    np.testing.assert_allclose(
        bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3 * abs(theirs.coef_).max()
    )
    score = theirs.score(z, [example.label for example in data.test])
    assert run.summary["metrics"]["accuracy"] == pytest.approx(score, abs=1 / len(data.test) + 1e-9)


def test_clients_come_to_what_one_place_has(probe: dict[str, Any], tmp_path: Path) -> None:
    """To the rounding of float32, in which sums and gradients travel."""
    heads = []
    for baseline in ("federated", "centralised"):
        run = fedcustom.run(probe, {**TIGHT, "baseline": baseline}, out=tmp_path / baseline)
        heads.append(torch.cat([t.flatten() for t in head_of(run).values()]))
    assert float((heads[0] - heads[1]).norm() / heads[1].norm()) < 1e-4


def test_its_only_round(probe: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the recipe's rounds and remedies are; nothing but the head is trained, sent or counted."""
    recipe = {**probe, "rounds": {"count": 30, "clients_per_round": 2, "selection": "balanced"}}
    recipe["training"] = {"freeze_head_rounds": 4, "warmup_rounds": 3, "logit_adjustment": 1.0}
    complete = resolved(load_recipe(recipe))
    assert (complete.rounds.count, complete.rounds.clients_per_round) == (1, None)
    assert complete.rounds.selection == "uniform"
    training = complete.training
    assert (training.fit_head_rounds, training.logit_adjustment, training.freeze_head_rounds) == ([1], 0.0, 0)
    assert (training.warmup_rounds, training.prior_count) == (0, 1.0)
    assert resolved(complete) == complete
    run = fedcustom.run(recipe, out=tmp_path / "run")
    rows = rows_of(run.directory)
    assert [row["round"] for row in rows] == [0, 1]
    assert len(rows[1]["answered"]) == 4
    assert rows[1]["train_loss"] is None
    assert run.summary["trainable_parameters"] == 0
    assert run.summary["head_parameters"] == 3 * 33
    assert run.summary["metrics"]["loss"] < run.summary["untuned"]["loss"]
    assert run.summary["temperature"] is not None


def test_its_embeddings_are_the_base_models(probe: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = fedcustom.run(probe, out=tmp_path / "run")
    base = load_file(Path(probe["model"]["base"]) / "model.safetensors")
    saved = tensors_of(run.directory)
    for name, tensor in saved.items():
        if "classifier" not in name:
            assert torch.equal(tensor, base[name.removeprefix("encoder.")]), name
    assert len(saved) > 10


def test_locally_each_client_has_its_own(probe: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**probe, "clients": {"partition": "iid", "count": 3}, "baseline": "local"}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    assert run.summary["metrics"]["accuracy"] > run.summary["untuned"]["accuracy"]
    assert not (run.directory / "model").exists()


def test_models_with_their_own_linear_head(
    probe: dict[str, Any], tiny: dict[str, str], tmp_path: Path
) -> None:
    run = fedcustom.run({**probe, "model": {"base": tiny["bert"]}}, out=tmp_path / "run")
    assert rows_of(run.directory)[1]["method"]["head"].startswith("fitted to ")
    with pytest.raises(RecipeError, match=r"the head of .* does not end in a layer with a bias"):
        fedcustom.run({**probe, "model": {"base": tiny["llama"]}}, out=tmp_path / "llama")


def test_what_it_does_not_go_with(probe: dict[str, Any], generation: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data.task = 'generation': allowed for method.name = 'probe'"):
        load_recipe({**generation, "method": {"name": "probe"}})


MEAN = "needs aggregation.rule = 'mean' and aggregation.correction = 'none'"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"aggregation.rule": "median"}, MEAN),
        ({"aggregation.correction": "feddyn"}, MEAN),
        (
            {"participation.buffer": 2},
            "needs all clients at one state; leave participation.buffer unset",
        ),
        ({"personalisation.keep": ["head"]}, "does not go with personalisation.keep = ['head']"),
        ({"attack.kind": "sign_flip"}, "attack.kind = 'sign_flip' is defined for changes, not for sums"),
    ],
)
def test_what_sums_do_not_go_with_is_refused(
    probe: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    """In one line, before anything runs."""
    message = f"recipe: method.name = 'probe': {reason}"
    with pytest.raises(RecipeError) as caught:
        load_recipe(probe, overrides)
    assert str(caught.value).splitlines() == [message]


def test_from_the_command_line(probe: dict[str, Any], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    write_jsonl(tmp_path / "rows.jsonl", make_rows(80, 0))
    recipe = tmp_path / "recipe.toml"
    data = f'source = "{tmp_path / "rows.jsonl"}"\nmax_length = 24'
    recipe.write_text(
        f'[model]\nbase = "{probe["model"]["base"]}"\n[data]\n{data}\n[clients]\ncount = 3\n'
        'partition = "iid"\n[method]\nname = "probe"\n'
    )
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    assert fedcustom.load(tmp_path / "run").summary["rounds"] == 1
