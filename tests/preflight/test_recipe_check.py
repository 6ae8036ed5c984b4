"""The check of a recipe, for tasks and methods, against counts and masks that are computed another way."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import DataError, ModelError, PolicyError
from fedcustom.data.examples import LearningTask
from fedcustom.deployment.site.policy import check_recipe, needed_policy
from fedcustom.deployment.site.settings import PolicySettings
from fedcustom.federated.resolve import resolved
from fedcustom.methods.contents import CONTENTS
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.models.smollm2 import NAME, check_present
from fedcustom.preflight.examples import segments
from fedcustom.preflight.report import ShownExample
from fedcustom.recipe.recipe import load_recipe
from helpers.conversations import chat_llama, chat_recipe, conversations
from helpers.preferences import preference_recipe, preferences
from helpers.rows import make_rows, write_jsonl


def trained_text(example: ShownExample) -> list[str]:
    return [segment.text for segment in example.segments if segment.trained]


def whole_text(example: ShownExample) -> str:
    return "".join(segment.text for segment in example.segments)


def test_classification(small: dict[str, Any], data_folder: Path) -> None:
    found = fedcustom.check(small, {"rounds.count": 4, "training.fit_head_rounds": [1]})
    rows = [json.loads(line) for line in (data_folder / "train.jsonl").read_text().splitlines()]
    tested = [json.loads(line) for line in (data_folder / "test.jsonl").read_text().splitlines()]
    assert found.clients.count == len({row["site"] for row in rows})
    parts = [client.train + client.development + client.test for client in found.clients.listed]
    assert sorted(parts) == sorted((Counter(row["site"] for row in [*rows, *tested])).values())
    assert sum(found.clients.labels.values()) == found.rows["train"]
    for client in found.clients.listed:
        assert sum(client.labels.values()) == client.train
    assert {example.label for example in found.examples} <= {row["label"] for row in rows}
    assert not any(example.trained for example in found.examples)
    assert "labels" in found.inapplicable["examples"]
    assert found.filled["training.learning_rate"] == resolved(load_recipe(small)).training.learning_rate
    assert found.resources is not None
    assert {need.setting for need in found.policy} == {"sums", "base_models"}  # its base is a folder
    sent = {message.kind: message for message in found.messages}
    assert set(sent) == {"train", "fit head", "scale head", "head gradient"}
    assert (sent["train"].down, sent["train"].up) == (found.outline.down, found.outline.up)


def test_generation_marks_what_the_encoder_marks(generation: dict[str, Any], tiny: dict[str, str]) -> None:
    found = fedcustom.check(generation, measure=False)
    base = load_base(ModelSettings(base=tiny["llama"]), LearningTask("generation"), 0)
    rows = {f" {row['target']}": row for row in make_rows(160, 0)}
    assert found.examples
    for example in found.examples:
        (target,) = trained_text(example)
        row = rows[target.removesuffix(base.tokenizer.eos_token)]
        ids = base.tokenizer(f" {row['target']}", add_special_tokens=False)["input_ids"]
        assert example.trained == len(ids) + 1  # and the end token
        assert target == f" {row['target']}{base.tokenizer.eos_token}"
        assert whole_text(example).endswith(f"{row['source']} :{target}")
    assert found.inapplicable["labels"]
    assert found.inapplicable["resources"] == "was not asked for"


def test_chat_marks_every_answer(tmp_path: Path) -> None:
    base = chat_llama(tmp_path / "model")
    found = fedcustom.check(chat_recipe(tmp_path, base), measure=False, examples=100)
    rows = [row["messages"] for row in conversations()]
    said = {tuple(m["content"] for m in row if m["role"] == "assistant") for row in rows}
    assert len(found.examples) == found.rows["train"]
    for example in found.examples:
        answers = [text.removesuffix("\n") for text in trained_text(example)]
        assert all(text.endswith("<|im_end|>") for text in answers)
        assert tuple(text.removesuffix("<|im_end|>") for text in answers) in said


def test_preference_marks_both_answers(tmp_path: Path) -> None:
    base = chat_llama(tmp_path / "model")
    found = fedcustom.check(preference_recipe(tmp_path, base), measure=False, examples=100)
    pairs = {(row["chosen"], row["rejected"]) for row in preferences()}
    for example in found.examples:
        assert example.rejected is not None
        (chosen,) = trained_text(example)
        (rejected,) = [segment.text for segment in example.rejected if segment.trained]
        assert all(text.endswith("<|im_end|>") for text in (chosen, rejected))
        assert (chosen.removesuffix("<|im_end|>"), rejected.removesuffix("<|im_end|>")) in pairs


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "probe": {},
    "distillation": {"public.fraction": 0.2},
    "prompt_engineering": {
        "method.strategy": "black_box",
        "method.instructions": ["{label}"],
        "method.dimensions": 4,
        "method.prompt_length": 2,
        "method.examples": 4,
        "method.local_generations": 1,
    },
}


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_with_other_messages(name: str, small: dict[str, Any]) -> None:
    recipe = {**small, "method": {"name": name}, "training": {}}
    found = fedcustom.check(recipe, METHODS[name])
    assert found.messages
    assert found.resources is not None or name in found.inapplicable["resources"]
    for message in found.messages:
        assert set(message.contents) <= set(CONTENTS)
        assert message.asks
        assert "``" not in message.asks + message.answer
    json.dumps(found.to_dict(), allow_nan=False)


def test_retrieval(tmp_path: Path, tiny: dict[str, str]) -> None:
    rows = [
        {"question": row["text"], "answer": f"{row['target']} {n}"} for n, row in enumerate(make_rows(24, 0))
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    recipe = {
        "model": {"base": tiny["bert"]},
        "data": {
            "source": str(tmp_path), "task": "retrieval", "prompt": "{question}", "target": "{answer}",
            "max_length": 24, "max_target_length": 24,
        },
        "clients": {"partition": "iid", "count": 2},
        "method": {"name": "retrieval", "chunk_length": 16, "chunk_overlap": 2},
        "rounds": {"count": 1},
    }  # fmt: skip
    found = fedcustom.check(recipe)
    documents = {row["answer"] for row in rows}
    assert {example.document for example in found.examples} <= documents
    kinds = {message.kind for message in found.messages}
    assert {"retrieve", "fetch"} <= kinds
    assert not {"route", "answer"} & kinds
    assert {need.setting for need in found.policy} == {"vectors", "base_models"}
    learned = fedcustom.check(recipe, {"method.routing": "learned"})
    assert "route" in {message.kind for message in learned.messages}


def test_a_baseline_sends_nothing(small: dict[str, Any]) -> None:
    found = fedcustom.check(small, {"baseline": "centralised"}, measure=False, examples=0)
    assert not found.messages
    assert "nothing is sent" in found.inapplicable["messages"]


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_needed_policy_is_enough_and_no_more(path: Path) -> None:
    """With the lines that are named a site takes part; without one of them it does not."""
    recipe = load_recipe(path)
    if recipe.model.base == NAME:
        try:
            check_present()
        except ModelError as error:
            pytest.skip(str(error))
    recipe = resolved(recipe)
    needs = {need.setting: need.value for need in needed_policy(recipe)}
    check_recipe(PolicySettings.model_validate(needs), recipe)
    for setting in needs:
        less = {name: value for name, value in needs.items() if name != setting}
        with pytest.raises(PolicyError, match=setting):
            check_recipe(PolicySettings.model_validate(less), recipe)


def test_lists_are_capped_and_counted(small: dict[str, Any]) -> None:
    partition = {"partition": "iid", "count": 53, "development_fraction": 0.1}
    found = fedcustom.check({**small, "clients": partition}, measure=False)
    assert (found.clients.count, len(found.clients.listed), found.clients.more) == (53, 50, 3)


def test_segments_of_tokens_that_share_a_character(tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny["llama"]), LearningTask("generation"), 0)
    text = "the old dog likes bread"
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    for cut in range(len(ids) + 1):
        found = segments(base.tokenizer, ids, [number >= cut for number in range(len(ids))])
        assert "".join(segment.text for segment in found) == text


def test_what_a_run_would_refuse(small: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no column 'ward'"):
        fedcustom.check(small, {"clients.column": "ward"})


def test_the_command(command: Any, small: dict[str, Any], tmp_path: Path) -> None:
    from fedcustom.recipe.recipe import to_toml

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(load_recipe(small)))
    said = command("check", recipe, "--no-measure", "--examples", 1, "--quiet")
    assert said.code == 0, said.error
    lines = {line.partition("  ")[0] for line in said.out.splitlines()}
    assert {"rows", "clients", "cut", "example 1", "message", "site's policy", "memory and time"} <= lines
    said = command("check", recipe, "--no-measure", "--json", "--quiet")
    found = json.loads(said.out)
    assert found["layout"] == 1
    assert list(found)[1:] == [
        "settings", "filled", "rows", "test_is_pooled", "clients", "cuts", "examples", "messages", "policy",
        "refused", "outline", "resources", "notes", "inapplicable",
    ]  # fmt: skip
    assert command("check", recipe, "--set", "data.label=gone").code == 2
