"""Runs on preference pairs: what they learn, what they say, what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcustom
from fedcustom.core.errors import DataError, ModelError, RecipeError, RunError
from fedcustom.data.settings import DataSettings, PublicSettings
from fedcustom.deployment.replies import SiteStatistics
from fedcustom.deployment.site.check import site_report
from fedcustom.deployment.site.data import SiteDataSettings, declared_settings, read_site
from fedcustom.deployment.site.settings import SiteSettings
from fedcustom.deployment.site.template import site_template
from fedcustom.evaluation.metrics import preference_metrics
from fedcustom.evaluation.statistics import check_statistics, mean_statistics, pooled_metrics
from fedcustom.recipe.recipe import Recipe, load_recipe
from fedcustom.report.page import write_report
from fedcustom.report.tables import comparison
from helpers.conversations import chat_llama
from helpers.preferences import assistant, preference_recipe, preferences, user
from helpers.rows import write_jsonl
from helpers.runs import rows_of, tensors_of

METRICS = {"loss", "preference_accuracy", "reward_margin", "likelihood_accuracy"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_llama(tmp_path_factory.mktemp("chat") / "llama")


@pytest.fixture(scope="module")
def learnt(llama: str, tmp_path_factory: pytest.TempPathFactory) -> fedcustom.Run:
    """A federated run of LoRA that learns all pairs."""
    folder = tmp_path_factory.mktemp("learnt")
    recipe = preference_recipe(folder, llama)
    recipe["training"] |= {"local_steps": 5, "learning_rate": 0.005}
    recipe["rounds"]["count"] = 4
    return fedcustom.run(recipe, out=folder / "run")


def test_pairs_are_learnt(learnt: fedcustom.Run) -> None:
    untuned, tuned = learnt.summary["untuned"], learnt.summary["metrics"]
    assert untuned.keys() == tuned.keys() == METRICS
    assert (untuned["loss"], untuned["preference_accuracy"], untuned["reward_margin"]) == (
        pytest.approx(math.log(2), abs=1e-15), 0.5, 0.0,
    )  # fmt: skip
    assert tuned["preference_accuracy"] > 0.9
    assert tuned["loss"] < 0.3
    rows = rows_of(learnt.directory)
    assert [set(row["development"]) for row in rows] == [METRICS] * 5
    losses = [row["development"]["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert learnt.summary["best_round"] == 4
    assert {"development.reward_margin", "development.preference_accuracy"} <= set(learnt.history.columns)


def test_figures_are_those_of_plain_transformers(learnt: fedcustom.Run, llama: str) -> None:
    import transformers

    base: Any = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tuned, tokenizer = learnt.model(), learnt.tokenizer()

    def likelihood(model: Any, prompt: str, answer: str) -> float:
        given = tokenizer.apply_chat_template([user(prompt)], add_generation_prompt=True)["input_ids"]
        whole = given + tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logits[place - 1, whole[place]]) for place in range(len(given), len(whole)))

    margins, likelier = [], []
    for row in preferences():
        one, other = row["chosen"], row["rejected"]
        own = [likelihood(tuned, row["prompt"], answer) for answer in (one, other)]
        fixed = [likelihood(base, row["prompt"], answer) for answer in (one, other)]
        margins.append(0.1 * ((own[0] - fixed[0]) - (own[1] - fixed[1])))
        likelier.append(own[0] - own[1])
    found = learnt.summary["metrics"]
    assert found["reward_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert found["loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), abs=1e-5)
    assert found["preference_accuracy"] == np.mean(np.array(margins) > 0)
    assert found["likelihood_accuracy"] == np.mean(np.array(likelier) > 0)
    lines = [json.loads(line) for line in (learnt.directory / "predictions.jsonl").open()]
    assert [line["reward_margin"] for line in lines] == pytest.approx(margins, abs=1e-4)
    assert [line["likelihood_margin"] for line in lines] == pytest.approx(likelier, abs=1e-3)
    assert {line["prediction"] for line in lines} == {"chosen"}
    rows = preferences()
    assert [line["messages"] for line in lines] == [[user(row["prompt"])] for row in rows]
    assert [(line["references"], line["rejected"]) for line in lines] == [
        ([row["chosen"]], row["rejected"]) for row in rows
    ]


def test_the_model_answers_and_is_exported(learnt: fedcustom.Run, tmp_path: Path) -> None:
    asked = "Who is the cat?"
    reply = learnt.chat([user(asked)])
    for given in (asked, {"prompt": asked}, {"messages": [user(asked)]}, preferences()[0]):
        assert learnt.predict([given]) == [{"text": reply.text}]
    assert (learnt.export(tmp_path / "exported") / "adapter_config.json").exists()


def test_reports_show_the_figures(learnt: fedcustom.Run, tmp_path: Path) -> None:
    frame = comparison([learnt.directory])
    assert set(frame.columns) >= METRICS
    assert "perplexity" not in frame.columns
    assert frame["untuned_preference_accuracy"].tolist() == [0.5]
    page = write_report([learnt.directory], tmp_path / "page.html").read_text()
    for said in ("Reward acc.", "Likelihood acc.", "Reward margin"):
        assert said in page


def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not(llama: str, tmp_path: Path) -> None:
    class Stop(fedcustom.Callback):
        def on_round_end(self, row: dict[str, Any]) -> None:
            if row["round"] == 1:
                raise KeyboardInterrupt

    recipe = preference_recipe(tmp_path, llama)
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(recipe, out=tmp_path / "halves", callbacks=[Stop()])
    halves = fedcustom.run(recipe, out=tmp_path / "halves", resume=True)
    assert halves.summary["metrics"] == whole.summary["metrics"]
    one, other = tensors_of(whole.directory), tensors_of(halves.directory)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("baseline", ["centralised", "local"])
def test_baselines(llama: str, tmp_path: Path, baseline: str) -> None:
    recipe = preference_recipe(tmp_path, llama) | {"baseline": baseline}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    assert set(run.summary["metrics"]) == METRICS
    assert run.summary["metrics"]["loss"] < math.log(2)


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "full", "ia3"])
def test_other_methods_run(llama: str, tmp_path: Path, method: str) -> None:
    recipe = preference_recipe(tmp_path, llama) | {"method": {"name": method}}
    run = fedcustom.run(recipe, out=tmp_path / "run")
    losses = [row["development"]["loss"] for row in rows_of(run.directory)]
    assert losses[-1] < losses[0]


def test_changed_rows_are_noticed(llama: str, tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path, llama)
    fedcustom.run(recipe, out=tmp_path / "run")
    rows = preferences()
    rows[3]["rejected"] += " Or is it?"
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(RunError, match="the rows of 1 of 2 clients differ"):
        fedcustom.run(recipe, out=tmp_path / "run")


# --- without a chat template ---


class Told(fedcustom.Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    on_information = on_note


def test_plain_texts_where_the_model_has_no_template(tiny: dict[str, str], tmp_path: Path) -> None:
    for model in ("llama", "bart"):
        place = tmp_path / model
        place.mkdir()
        recipe = preference_recipe(place, tiny[model], max_length=16, max_target_length=16)
        told = Told()
        run = fedcustom.run(recipe, out=place / "run", callbacks=[told])
        assert run.summary["untuned"]["loss"] == pytest.approx(math.log(2), abs=1e-15)
        assert run.summary["metrics"]["loss"] < math.log(2)
        said = "its tokenizer has no chat template, so that prompts and answers are plain texts"
        assert any(said in text for text in told.texts)
        assert set(run.predict(["Who is the cat?"])[0]) == {"text"}
        with pytest.raises(RunError, match="its model has no chat template"):
            run.chat([user("Who is the cat?")])


def test_what_plain_texts_do_not_have(tiny: dict[str, str], tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path, tiny["llama"], max_length=16, max_target_length=16)
    with pytest.raises(ModelError, match=r"data.system: .* has no chat template"):
        fedcustom.run(recipe, {"data.system": "Be brief."}, out=tmp_path / "system")
    with pytest.raises(ModelError, match=r"data.too_long = 'leave-out': .* has no chat template"):
        fedcustom.run(recipe, {"data.too_long": "leave-out"}, out=tmp_path / "long")
    rows: list[dict[str, Any]] = [dict(row) for row in preferences()]
    rows[4]["prompt"] = [user("Hello"), assistant("Good day."), user("Who is the hen?")]
    write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train.jsonl, train, line 5: the prompt is a conversation of 3"):
        fedcustom.run(recipe, out=tmp_path / "conversation")


# --- recipes ---


def test_the_objective_says_the_task(tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path, "builtin:lm")
    assert load_recipe(recipe).data.task == "preference"
    assert load_recipe(recipe).metric == "loss"
    del recipe["training"]["objective"]
    recipe["data"]["task"] = "preference"
    assert load_recipe(recipe).training.objective is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.task": "chat"}, "training.objective = 'dpo': learns from pairs .* not 'chat'"),
        ({"training.objective": "ppo"}, "training.objective = 'ppo': .*'dpo'"),
        ({"training.beta": 0}, "training.beta = 0"),
        ({"training.label_smoothing": 0.5}, "training.label_smoothing = 0.5"),
        ({"evaluation.metric": "rouge_l"}, "evaluation.metric = 'rouge_l': allowed for preference: loss"),
        ({"evaluation.generate": False}, "evaluation.generate = false: is for generation, not preference"),
        ({"evaluation.generate_limit": 3}, "evaluation.generate_limit = 3: is for generation"),
        ({"method.name": "retrieval"}, "data.task = 'preference': allowed for method.name = 'retrieval'"),
        ({"method.name": "probe"}, "data.task = 'preference': allowed for method.name = 'probe'"),
        ({"public.fraction": 0.5}, r"\[public\]: no method for data.task = 'preference'"),
        ({"training.fit_head_rounds": [1]}, "training.fit_head_rounds"),
    ],
)  # fmt: skip
def test_refused_recipes(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(preference_recipe(tmp_path, "builtin:lm"), changes)


@pytest.mark.parametrize("key", ["beta", "label_smoothing"])
def test_settings_of_an_objective_that_is_not_used(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"training.{key} = 0.2: is for data.task = 'preference'"):
        load_recipe({"training": {key: 0.2}})


def test_a_recipe_without_preferences_does_not_write_their_settings() -> None:
    """So that digests of results stay: what is unset is left out of them."""
    written = Recipe().model_dump(exclude_none=True)
    assert {"objective", "beta", "label_smoothing"}.isdisjoint(written["training"])
    assert {"chosen", "rejected"}.isdisjoint(written["data"])


# --- sites ---

SITE = {"columns": ["prompt", "chosen", "rejected"], "prompt": "{prompt}", "chosen": "{chosen}"}


def test_statistics_of_sites_give_the_metrics_of_all_their_pairs() -> None:
    scores = np.random.default_rng(0).normal(size=(11, 3)) - [[-1, 3, 0]]
    parts = [
        check_statistics(json.loads(json.dumps(mean_statistics(preference_metrics(some), {}, len(some)))), 0)
        for some in (scores[:4], scores[4:])
    ]
    whole = preference_metrics(scores)
    assert whole["reward_margin"] < 0
    assert pooled_metrics(parts) == pytest.approx(whole)
    assert SiteStatistics.from_values({"whole": parts[0]}, 0).global_model == parts[0]


def test_a_site_declares_its_columns(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "patient": "x"} for row in preferences()])
    own = SiteDataSettings(train="rows.jsonl", rejected="{rejected}", **SITE)  # type: ignore[arg-type]
    data = read_site(own, tmp_path, DataSettings(task="preference"), PublicSettings())
    found = data.examples("train", [])
    assert [(e.text, e.target, e.rejected) for e in found] == [tuple(row.values()) for row in preferences()]
    assert all("patient" not in row for row in data.train)
    assert "rows: 10 train, 0 development, 0 test" in list(
        site_report(SiteSettings(data=own), tmp_path / "s")
    )
    with pytest.raises(fedcustom.FedcustomError, match=r"data\.rejected is not set in this site's site"):
        declared_settings(SiteDataSettings(**SITE), DataSettings(task="preference"))  # type: ignore[arg-type]
    text = site_template(load_recipe(preference_recipe(tmp_path, "builtin:lm")))
    for key in ("prompt", "chosen", "rejected"):
        assert f'\n{key} = "{{{key}}}"\n' in text


def test_a_site_with_whole_conversations(tmp_path: Path) -> None:
    rows = [
        {key: [user(row["prompt"]), assistant(row[key])] for key in ("chosen", "rejected")}
        for row in preferences()
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    own = SiteDataSettings(
        train="rows.jsonl", columns=["chosen", "rejected"], chosen="{chosen}", rejected="{rejected}"
    )
    found = read_site(own, tmp_path, DataSettings(task="preference"), PublicSettings()).examples("train", [])
    assert [(e.text, e.target, e.rejected) for e in found] == [tuple(row.values()) for row in preferences()]
