"""Every method gives the same final tensors across sites as in process; some of them over the real engine."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.watch.page import parts
from fedcustom.watch.runs import Watched
from helpers.chat import template
from helpers.conversations import chat_llama, chat_recipe
from helpers.deployed import Bed, bed
from helpers.loopback import run_in_loopback
from helpers.preferences import preference_recipe
from helpers.rows import make_rows, write_jsonl
from helpers.site_recipes import dealt_recipe, written
from helpers.tracking import check_event_files

ENGINE = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]
"""Marks of what takes the engine, and many seconds a job."""

LOOPBACK = pytest.mark.xdist_group("loopback")
"""Mark of what shares kits: one worker makes them."""

PROMPTS = ["{label}", "a text about {label}", "the {label} is here"]

VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {"method": {"name": "prefix", "length": 4}},
    "key-value prefix": {"method": {"name": "prefix", "kind": "kv", "length": 4}},
    "soft_prompt": {"method": {"name": "soft_prompt", "length": 4}},
    "lora": {"method": {"name": "lora", "rank": 2}, "aggregation": {"server_optimizer": "fedadam"}},
    "lora stacked": {"method": {"name": "lora", "rank": 2, "variant": "flora"}},
    "lora factored anew": {
        "method": {"name": "lora", "rank": 2, "variant": "fedsvd"},
        "aggregation": {"server_optimizer": "fedavgm"},
    },
    "lora sketched": {
        "method": {"name": "lora", "rank": 2, "variant": "fedask", "oversampling": 2},
        "compression": {"kind": "int8"},
    },
    "adapter": {"method": {"name": "adapter"}},
    "ia3 with a fitted head": {
        "method": {"name": "ia3"}, "compression": {"kind": "int8"},
        "training": {"batch_size": 8, "cohort_width": 1, "local_steps": 2, "fit_head_rounds": [1, 3]},
    },
    "balanced cohorts": {
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8, "cohort_width": 1, "fit_head_rounds": [1, -1]},
        "rounds": {"count": 4, "clients_per_round": 2, "selection": "balanced"},
    },
    "probe": {"method": {"name": "probe"}},
    "pooled, with a fitted head": {
        "method": {"name": "lora", "rank": 2}, "model": {"pooling": "mean", "normalize": True},
        "training": {"batch_size": 8, "cohort_width": 1, "fit_head_rounds": [1, -1]},
    },
    "bitfit": {"method": {"name": "bitfit"}, "personalisation": {"keep": ["head"]}},
    "full": {
        "method": {"name": "full"}, "aggregation": {"correction": "scaffold"},
        "training": {"batch_size": 8, "optimizer": "sgd", "clip_norm": 0.0, "learning_rate": 0.01},
    },
    "compressed": {
        "method": {"name": "lora", "rank": 2, "variant": "ffa"},
        "compression": {"kind": "int8", "error_feedback": True, "down": True},
    },
    "sparse": {
        "method": {"name": "prefix", "length": 4}, "compression": {"kind": "top_k", "fraction": 0.2},
    },
    "prompt selection": {
        "method": {"name": "prompt_engineering", "instructions": PROMPTS, "examples": 6, "edits": 2},
    },
    "in-context": {
        "method": {
            "name": "prompt_engineering", "strategy": "in_context", "instructions": ["{input} :"],
            "demonstrations": 1, "retriever": "bert",
        },
        "model": "llama",
    },
    "black box": {
        "method": {
            "name": "prompt_engineering", "strategy": "black_box", "instructions": PROMPTS,
            "prompt_length": 3, "dimensions": 6, "local_generations": 2, "examples": 6,
        },
    },
    "distillation": {"method": {"name": "distillation", "client_models": ["bert", "llama"]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(make_rows(120, 0))]
    folder = written(tmp_path_factory.mktemp("texts") / "rows", rows[:90], rows[90:])
    write_jsonl(
        folder / "public.jsonl", [{"text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(12, 5))]
    )
    return dealt_recipe(
        tiny["bert"],
        folder,
        3,
        public={"source": str(folder), "split": "public"},
        training={"batch_size": 8, "cohort_width": 1, "local_steps": 2},
        rounds={"count": 3},
        evaluation={"batch_size": 16},
    )


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Iterator[Bed]:
    """A federation whose sites run in this process."""
    with bed(tmp_path_factory.mktemp("federation") / "f", recipe, start=False) as made:
        yield made


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Iterator[Bed]:
    with bed(tmp_path_factory.mktemp("federation") / "f", recipe) as made:
        yield made


def changed(recipe: dict[str, Any], tiny: dict[str, str], variant: dict[str, Any]) -> dict[str, Any]:
    """The recipe with what a variant says, names of tiny models replaced by their folders."""
    text = json.dumps({key: value for key, value in variant.items() if key != "model"})
    for kind, folder in tiny.items():
        text = text.replace(json.dumps(kind), json.dumps(folder))
    result = {**recipe, **json.loads(text)}
    if variant["method"]["name"] != "distillation" and variant["method"].get("strategy") != "in_context":
        result.pop("public")
    if variant["method"]["name"] == "prompt_engineering":
        result.pop("training")
    if isinstance(model := variant.get("model", {}), str):
        model = {"base": tiny[model]}
    result["model"] = {**recipe["model"], **model}
    return result


def compare(
    made: Bed,
    recipe: dict[str, Any],
    tmp_path: Path,
    run: Callable[[Bed, Path], dict[str, Any]] = run_in_loopback,
) -> None:
    """Run a recipe in process and across sites, and compare states, metrics and bytes."""
    made.recipe = recipe
    summary = run(made, tmp_path / "deployed")
    here = fedcustom.run(recipe, out=tmp_path / "here")
    ours, theirs = (Checkpoints(tmp_path / name / "checkpoints") for name in ("here", "deployed"))
    assert ours.rounds() == theirs.rounds()
    for number in ours.rounds():
        a, b = ours.load(number).state, theirs.load(number).state
        assert a.tensors.keys() == b.tensors.keys()
        assert a.server.keys() == b.server.keys()
        for name, tensor in (a.tensors | a.server).items():
            other = (b.tensors | b.server)[name]
            assert other.dtype == tensor.dtype
            assert (other.double() - tensor.double()).abs().max() <= 1e-6, name
    assert summary["metrics"] == pytest.approx(here.summary["metrics"], abs=1e-6)
    assert summary["best_round"] == here.summary["best_round"]
    if "personalised" in here.summary:
        mine, other = summary["personalised"], here.summary["personalised"]
        assert mine["client_mean"] == pytest.approx(other["client_mean"], abs=1e-6)
    assert summary["bytes"]["down_total"] == pytest.approx(here.summary["bytes"]["down_total"], rel=1e-3)
    assert summary["bytes"]["up_total"] == pytest.approx(here.summary["bytes"]["up_total"], rel=1e-2)


@LOOPBACK
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_is_the_same_across_sites(
    kits: Bed, recipe: dict[str, Any], tiny: dict[str, str], tmp_path: Path, name: str
) -> None:
    compare(kits, changed(recipe, tiny, VARIANTS[name]), tmp_path)


@LOOPBACK
def test_a_deployed_run_is_tracked_and_watched(kits: Bed, recipe: dict[str, Any], tmp_path: Path) -> None:
    kits.recipe = {**recipe, "tracking": {"to": ["tensorboard"], "timeout": 300.0}}
    run_in_loopback(kits, tmp_path / "run")
    check_event_files(tmp_path / "run")
    for name in kits.names:
        records = [file for file in kits.own(name).rglob("*.json") if "tensorboard" in file.read_text()]
        assert not records, name  # sites are not told of it
    details = parts(*Watched([tmp_path / "run"]).runs())["details"]
    assert "Sites of run" in details
    assert details.count("answered in round 3") == len(kits.names)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=ENGINE)
        for name in ("prefix", "balanced cohorts", "full", "compressed", "in-context", "distillation")
    ],
)
def test_over_the_engine(
    federation: Bed, recipe: dict[str, Any], tiny: dict[str, str], tmp_path: Path, name: str
) -> None:
    compare(federation, changed(recipe, tiny, VARIANTS[name]), tmp_path, Bed.run)


@pytest.mark.slow
@pytest.mark.xdist_group("deployment")
def test_retrieval_is_the_same_across_sites(tiny: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for split, count, start in (("train", 45, 0), ("test", 12, 45)):
        rows = [
            {
                "question": f"what is thing {number}", "site": f"site-{number % 3}",
                "answer": " ".join(f"word{(number * 7 + k) % 50}" for k in range(12)),
            }
            for number in range(start, start + count)
        ]  # fmt: skip
        write_jsonl(source / f"{split}.jsonl", rows)
    recipe = {
        "model": {"base": tiny["bert"]},
        "data": {
            "source": str(source), "task": "retrieval", "test": "test", "prompt": "{question}",
            "target": "{answer}", "max_length": 16, "max_target_length": 24,
        },
        "clients": {"partition": "natural", "column": "site", "test_fraction": 0.0},
        "method": {
            "name": "retrieval", "chunk_length": 12, "chunk_overlap": 4, "train": "lora",
            "shared_negatives": 3,
        },
        "training": {"cohort_width": 1, "local_steps": 2, "batch_size": 8},
        "rounds": {"count": 2},
    }  # fmt: skip
    with bed(tmp_path / "f", recipe) as made:
        compare(made, recipe, tmp_path, Bed.run)


def test_conversations_are_the_same_across_sites(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    recipe = chat_recipe(rows, chat_llama(tmp_path / "models" / "llama"), chat_template=template("chatml"))
    del recipe["data"]["development"]  # the sites' own, while the server has test rows
    recipe["clients"]["development_fraction"] = 0.2
    recipe["training"]["cohort_width"] = 1
    with bed(tmp_path / "f", recipe, start=False) as made:
        site = tomllib.loads((made.kit(made.names[0]) / "data" / "site.toml").read_text())
        assert site["data"]["messages"] == "messages"
        assert site["policy"]["chat_templates"]
        compare(made, recipe, tmp_path)


def test_preferences_are_the_same_across_sites(tmp_path: Path) -> None:
    """Sites evaluate, too: the server has no pairs of its own."""
    rows = tmp_path / "rows"
    rows.mkdir()
    recipe = preference_recipe(rows, chat_llama(tmp_path / "models" / "llama"))
    del recipe["data"]["development"], recipe["data"]["test"]
    recipe["clients"] |= {"development_fraction": 0.2, "test_fraction": 0.2}
    recipe["training"]["cohort_width"] = 1
    with bed(tmp_path / "f", recipe, start=False) as made:
        site = tomllib.loads((made.kit(made.names[0]) / "data" / "site.toml").read_text())
        assert site["data"]["rejected"] == "{rejected}"
        compare(made, recipe, tmp_path)
