"""Merged exports, model cards and uploads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

import fedcustom
from fedcustom.core.errors import RunError
from fedcustom.exporting.card import disclosure, hub_name
from fedcustom.methods.distillation.method import Distillation
from fedcustom.methods.retrieval.method import Retrieval
from fedcustom.methods.tuning.export_check import SWITCH
from fedcustom.methods.tuning.loading_page import loading_code
from fedcustom.methods.tuning.method import WeightTuning

TEXTS = ["the old cat near the river", "bread"]
QUICK = {
    "rounds.count": 1,
    "training.local_steps": 2,
    "training.learning_rate": 0.05,
    "evaluation.untuned": False,
}


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are compared with the trained model in a fresh process."""
    monkeypatch.setenv(SWITCH, "on")


def quick(recipe: dict[str, Any], out: Path, method: dict[str, Any], **changes: Any) -> fedcustom.Run:
    return fedcustom.run({**recipe, "method": method}, {**QUICK, **changes}, out=out, check_export=False)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", {"name": "lora", "rank": 3}),
        ("llama", {"name": "lora", "rank": 2, "variant": "fedsb"}),
        ("gpt2", {"name": "ia3"}),
    ],
    ids=["lora", "fedsb", "ia3"],
)
def test_a_merged_generator_is_a_plain_model(
    generation: dict[str, Any], tiny: dict[str, str], tmp_path: Path, kind: str, method: dict[str, Any]
) -> None:
    recipe = {**generation, "model": {"base": tiny[kind]}}
    run = quick(recipe, tmp_path / "run", method, **{"evaluation.generate": False})
    folder = run.export(tmp_path / "merged", merge=True, check=False)
    assert not (folder / "adapter_config.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = run.tokenizer()(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        merged, adapted = model(**ids).logits, run.model()(**ids).logits
        plain = base(**ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {
        torch.float32
    }


def test_a_merged_classifier_is_compared_in_a_fresh_process(
    small: dict[str, Any], tmp_path: Path, checked: None, command: Any
) -> None:
    run = quick(small, tmp_path / "run", {"name": "lora", "rank": 2})
    said = command("export", run.directory, "--to", tmp_path / "merged", "--merge")
    assert said.code == 0, said.error
    assert "licence of" in said.error
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "PeftModel" not in loading_code(text)
    assert str(small["model"]["base"]) not in text


def test_what_cannot_be_merged_says_why(
    generation: dict[str, Any], small: dict[str, Any], tmp_path: Path
) -> None:
    never = {"evaluation.generate": False}
    kv = quick(generation, tmp_path / "kv", {"name": "prefix", "kind": "kv", "length": 4}, **never)
    with pytest.raises(RunError, match=r"prefix tuning\) stands beside the input"):
        kv.export(tmp_path / "a", merge=True, check=False)
    memory = quick(generation, tmp_path / "memory", {"name": "prefix", "length": 4}, **never)
    with pytest.raises(RunError, match="attention slots are no part of any matrix"):
        memory.export(tmp_path / "a", merge=True, check=False)
    prompts = {key: value for key, value in small.items() if key != "training"}
    method = {"name": "prompt_engineering", "examples": 4, "instructions": ["{label}", "a {label}"]}
    prompt = fedcustom.run({**prompts, "method": method}, {"rounds.count": 1}, out=tmp_path / "prompt")
    with pytest.raises(RunError, match="leaves the weights of"):
        prompt.export(tmp_path / "a", merge=True, check=False)
    bitfit = quick(small, tmp_path / "bitfit", {"name": "bitfit"})
    notes = list[str]()
    bitfit.export(tmp_path / "whole", merge=True, check=False, note=notes.append)
    assert "whole already" in " ".join(notes)
    with pytest.raises(RunError, match="two forms"):
        bitfit.export(tmp_path / "a", merge=True, form="feed-forward", check=False)
    assert not (tmp_path / "a").exists()


def test_quantised_bases_are_not_merged(generation: dict[str, Any], tmp_path: Path) -> None:
    run = quick(generation, tmp_path / "run", {"name": "lora"}, **{"evaluation.generate": False})
    text = (run.directory / "recipe.toml").read_text()
    (run.directory / "recipe.toml").write_text(text.replace("[model]\n", '[model]\nquantization = "int8"\n'))
    with pytest.raises(RunError, match="trained beside weights in int8"):
        fedcustom.load(run.directory).export(tmp_path / "a", merge=True, check=False)


def test_the_card_says_what_the_run_did(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "model": {"base": "builtin:minilm"}, "method": {"name": "lora", "rank": 2}}
    run = fedcustom.run(recipe, {"rounds.count": 1, "training.local_steps": 1}, out=tmp_path / "run")
    folder = run.export(tmp_path / "model", check=False)
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    card = ModelCard(text)
    data = card.data
    assert (data.base_model, data.license) == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-classification")
    assert {"fedcustom", "federated-learning", "lora"} <= set(data.tags)
    results = {each.metric_name: each.metric_value for each in data.eval_results}
    assert results == pytest.approx(run.summary["metrics"])
    assert {each.dataset_type for each in data.eval_results} == {"private"}
    index = yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert index[0]["results"][0]["task"]["type"] == "text-classification"
    assert str(tmp_path) not in text
    assert small["data"]["source"] not in text
    assert loading_code(text).startswith("# The base model is the package")
    assert "by 4 clients, 4 of them in a round" in text
    assert f"| accuracy | {run.summary['metrics']['accuracy']:.4g} |" in text
    assert "No differential privacy is promised" in text
    assert "every client sends the change of its trained tensors" in text


def test_a_promise_of_privacy_is_in_the_card(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {
        **small,
        "method": {"name": "lora", "rank": 2},
        "training": {"batch_size": 8, "fit_head": False},
    }
    private = {"unit": "client", "epsilon": 8.0, "delta": 0.02}
    changes = {"rounds.count": 2, "rounds.clients_per_round": 2, "training.local_steps": 1}
    run = fedcustom.run({**recipe, "privacy": private}, changes, out=tmp_path / "run")
    text = (run.export(tmp_path / "model", check=False) / "README.md").read_text()
    promise = run.summary["privacy"]
    assert f"Differential privacy of each client: epsilon {promise['epsilon']:.4g}" in text
    assert f"delta {promise['delta']:g}" in text
    assert "- timing, and lengths of messages" in text
    assert "No differential privacy" not in text


def test_methods_say_what_they_disclose() -> None:
    for kind in (WeightTuning, Distillation, Retrieval):
        text = disclosure(kind.__new__(kind))
        assert len(text) > 50
        assert ":class:" not in text
        assert "``" not in text


def test_names_on_the_hub(tmp_path: Path) -> None:
    assert hub_name("org/data") == "org/data"
    assert hub_name(str(tmp_path)) is None
    assert hub_name("builtin:lm") is None
    assert hub_name("builtin:minilm") == "sentence-transformers/all-MiniLM-L6-v2"


class Hub:
    """A hub that keeps what it is sent."""

    def __init__(self, *, private: bool = True, token: bool = True) -> None:
        self.private, self.token = private, token
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, **_: Any) -> Hub:
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        if not self.token:
            raise LocalTokenNotFoundError("none")
        self.calls.append((name, options))
        return _Address(f"https://hub.example/{name}", f"me/{name}")

    def model_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        names = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append((options["repo_id"], {"files": names}))


class _Address(str):
    repo_id: str

    def __new__(cls, text: str, repo_id: str) -> _Address:
        found = super().__new__(cls, text)
        found.repo_id = repo_id
        return found


def test_a_model_is_uploaded_to_a_private_repository(
    small: dict[str, Any], tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quick(small, tmp_path / "run", {"name": "lora", "rank": 2})
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    said = command("export", run.directory, "--to", tmp_path / "adapter", "--push-to-hub", "mine")
    assert said.code == 2, "an adapter on a folder of this machine"
    assert "names the base model's folder" in said.error
    assert hub.calls == []
    said = command("export", run.directory, "--to", tmp_path / "m", "--merge", "--push-to-hub", "mine")
    assert said.code == 0, said.error
    assert "hub: https://hub.example/mine" in said.out
    (name, options), (where, sent) = hub.calls
    assert (name, options) == ("mine", {"private": True, "exist_ok": True})
    assert where == "me/mine"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(sent["files"])
    for other, words in (
        (Hub(token=False), "hf auth login"),
        (Hub(private=False), "say --public to upload to it"),
    ):
        monkeypatch.setattr(huggingface_hub, "HfApi", other)
        with pytest.raises(RunError, match=words):
            run.push_to_hub(tmp_path / "m", "mine")
        assert "files" not in str(other.calls)
    public = Hub(private=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", public)
    run.push_to_hub(tmp_path / "m", "org/mine", public=True)
    assert public.calls[0] == ("org/mine", {"private": False, "exist_ok": True})
    for bad in ("a b", "a/b/c", "-x-"):
        said = command("export", run.directory, "--to", tmp_path / "b", "--push-to-hub", bad)
        assert said.code == 2
        assert not (tmp_path / "b").exists()
    said = command("export", run.directory, "--to", tmp_path / "b", "--public")
    assert said.code == 2
    assert "--public: has an effect with --push-to-hub alone" in said.error
