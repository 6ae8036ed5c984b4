"""What is saved loads with the ecosystem's own tools, without this package, and gives the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.core.errors import RunError
from fedcustom.data.examples import Example, LearningTask
from fedcustom.methods.tuning.model_card import offline
from fedcustom.models import smollm2
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from helpers.interpreter import run_python
from helpers.methods import make
from helpers.smollm2 import needs_smollm2

CLASSIFIER = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, base, texts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
if base:
    from peft import PeftModel
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, folder)
else:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
model.eval()
assert "fedcustom" not in sys.modules
with torch.no_grad():
    rows = [model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits[0].tolist() for t
    in texts]
print(json.dumps(rows))
"""

GENERATOR = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base, texts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder)
if base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
model.eval()
answers = []
for text in texts:
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(output, skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


def elsewhere(code: str, folder: Path, base: str, texts: list[str]) -> list[Any]:
    """Run code in a process that has not heard of this package."""
    done = run_python(code, json.dumps([str(folder), base, texts]))
    assert done.returncode == 0, done.stderr
    rows: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return rows


def settings(method: str) -> dict[str, Any]:
    """A method whose folder is an adapter of PEFT's, or a plain model."""
    return {"name": method} | ({"kind": "kv"} if method == "prefix" else {})


@pytest.mark.parametrize("method", ["prefix", "lora", "soft_prompt", "full"])
def test_classifier_outputs_are_the_same_elsewhere(
    small: dict[str, Any], tmp_path: Path, method: str
) -> None:
    run = fedcustom.run({**small, "method": settings(method)}, out=tmp_path / "run")
    folder = run.export(tmp_path / "exported")
    texts = ["the old cat near a house", "bread and milk"]
    base = "" if method == "full" else small["model"]["base"]
    method_, state = run._method
    ours = method_.predict(state, [Example(text, label=0) for text in texts], texts=False).scores
    theirs = elsewhere(CLASSIFIER, folder, base, texts)
    assert torch.tensor(theirs).numpy() == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("method", ["prefix", "lora", "soft_prompt", "full"])
def test_generated_texts_are_the_same_elsewhere(
    generation: dict[str, Any], tmp_path: Path, method: str
) -> None:
    run = fedcustom.run(
        {**generation, "method": settings(method)}, {"training.local_epochs": 4}, out=tmp_path / "run"
    )
    folder = run.export(tmp_path / "exported")
    sources = ["kind animal thing cat", "kind food thing bread"]
    base = "" if method == "full" else generation["model"]["base"]
    theirs = elsewhere(GENERATOR, folder, base, [f"{source} :" for source in sources])
    assert theirs == [answer["text"] for answer in run.predict(sources)]


def test_models_open_in_this_process(small: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    adapter = fedcustom.run({**small, "method": settings("prefix")}, out=tmp_path / "adapter")
    assert isinstance(adapter.model(), PeftModel)
    full = fedcustom.run({**small, "method": {"name": "full"}}, out=tmp_path / "full")
    model = full.model()
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.id2label == {0: "animal", 1: "food", 2: "place"}
    for run in (adapter, full):
        inputs = run.tokenizer()("a cat", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            shares = run.model()(**inputs).logits.softmax(-1)[0]
        answer = run.predict(["a cat"])[0]
        assert list(answer["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-5)


def test_the_saved_page_names_what_is_needed(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, out=tmp_path / "run")
    page = (run.directory / "model" / "README.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    done = run_python(code, cwd=run.directory / "model")
    assert done.stdout.strip() == run.predict(["a text"])[0]["label"]


def run_card(folder: Path, *, without: str = "") -> str:
    """What the code of a folder's card prints, in a process that can reach no hub; ``without`` is a package
    that it cannot import either.
    """
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    hidden = f"import sys\nsys.modules[{without!r}] = None\n" if without else ""
    done = run_python(hidden + code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BUILTIN = {"base": "builtin:lm-small"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_generator_on_a_builtin_base_needs_no_hub(
    generation: dict[str, Any], tmp_path: Path, method: str
) -> None:
    recipe = {**generation, "model": BUILTIN, "method": settings(method)}
    run = fedcustom.run(recipe, {"rounds.count": 1, "evaluation.untuned": False}, out=tmp_path / "run")
    inputs = run.tokenizer()("a text", return_tensors="pt", return_token_type_ids=False)
    output = run.model().generate(**inputs, max_new_tokens=64)[0]
    expected = run.tokenizer().decode(output, skip_special_tokens=True).strip()
    assert run_card(run.directory / "model") == expected

    folder = run.export(tmp_path / "exported")
    assert run_card(folder, without="fedcustom") == expected
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert sum(path.stat().st_size for path in (folder / "base").iterdir()) < 14e6
    for path in (folder / "README.md", folder / "adapter_config.json"):
        assert str(Path(fedcustom.__file__).parent) not in path.read_text()


@pytest.mark.slow
def test_a_classifier_on_a_builtin_decoder_needs_no_hub(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "model": BUILTIN, "method": {"name": "lora"}}
    run = fedcustom.run(recipe, {"rounds.count": 1, "evaluation.untuned": False}, out=tmp_path / "run")
    expected = run.predict(["a text"])[0]["label"]
    assert run_card(run.directory / "model") == expected
    assert run_card(run.export(tmp_path / "exported"), without="fedcustom") == expected


@pytest.mark.slow
def test_a_prompt_for_a_builtin_base_needs_no_hub(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**small, "model": BUILTIN, "method": {"name": "prompt_engineering"}}
    recipe.pop("training")
    run = fedcustom.run(recipe, {"rounds.count": 1, "evaluation.untuned": False}, out=tmp_path / "run")
    expected = run.predict(["a text"])[0]["label"]
    assert run_card(run.directory / "model") == expected
    folder = run.export(tmp_path / "exported")
    assert run_card(folder, without="fedcustom") == expected
    assert (folder / "base" / "config.json").exists()


def test_a_whole_model_takes_no_base_along(generation: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**generation, "model": BUILTIN, "method": {"name": "full"}}
    run = fedcustom.run(recipe, {"rounds.count": 1, "evaluation.untuned": False}, out=tmp_path / "run")
    folder = run.export(tmp_path / "exported")
    assert not (folder / "base").exists()


def test_an_encoder_of_a_package_is_found_in_it(tmp_path: Path) -> None:
    base = load_base(ModelSettings(base="builtin:minilm"), LearningTask("retrieval"), 0, head=False)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    code = (
        f'from transformers import AutoModel\nprint(AutoModel.from_pretrained("{name}").config.hidden_size)'
    )
    card = offline(f"# For {name}\n\n```python\n{code}\n```\n", base)
    assert f"hub: {name}" in card
    (tmp_path / "README.md").write_text(card)
    assert run_card(tmp_path, without="fedcustom") == "384"
    assert offline("# No code", base) == "# No code"


def test_export_does_not_overwrite(small: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(small, out=tmp_path / "run")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(RunError, match="exists already"):
        run.export(tmp_path / "there")


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("method", ["lora", "prompt_engineering"])
def test_an_export_on_smollm2_names_the_hub_and_says_what_to_do_offline(
    generation: dict[str, Any], small: dict[str, Any], tmp_path: Path, method: str
) -> None:
    recipe = {**(generation if method == "lora" else small), "model": {"base": smollm2.NAME}}
    recipe["method"] = {"name": method}
    if method != "lora":
        recipe.pop("training")
    cheap = {"rounds.count": 1, "evaluation.untuned": False, "evaluation.max_new_tokens": 4}
    run = fedcustom.run(recipe, cheap, out=tmp_path / "run", check_export=True)
    folder = run.export(tmp_path / "exported", check=True)  # compares outputs with those in training
    assert not (folder / "base").exists()
    for path in folder.rglob("*.*"):
        if path.suffix in (".md", ".json"):
            assert str(smollm2.converted_folder()) not in path.read_text()
    if method == "lora":
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"

    page = (folder / "README.md").read_text()
    assert all(part in page for part in ("Apache-2.0", smollm2.INSTALL, smollm2.INSTALL_READER))
    use, convert = (part.split("```")[0] for part in page.split("```python\n")[1:])
    assert '"HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32"' in use
    done = run_python(f"import sys\nsys.modules['fedcustom'] = None\n{convert}", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = run_python(use.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), cwd=folder)
    assert done.returncode == 0, done.stderr
    if method == "lora":
        inputs = run.tokenizer()("a text", return_tensors="pt", return_token_type_ids=False)
        output = run.model().generate(**inputs, max_new_tokens=64)[0]
        assert done.stdout.strip() == run.tokenizer().decode(output, skip_special_tokens=True).strip()
    else:
        assert done.stdout.strip() == run.predict(["a text"])[0]["label"]


@pytest.mark.slow
@needs_smollm2
def test_a_whole_smollm2_says_where_it_comes_from(tmp_path: Path) -> None:
    base = load_base(ModelSettings(base=smollm2.NAME), LearningTask("generation"), 0)
    page = offline('# A customised model\n\n```python\nmodel = load(".")\n```\n', base)
    assert "Apache-2.0" in page
    assert smollm2.INSTALL not in page


def test_a_large_model_is_saved_in_shards(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an index of them, and read again as it was."""
    monkeypatch.setattr("fedcustom.methods.full.method.SHARD", "40KB")
    for name in ("full", "adapter", "bitfit"):
        method = make(tiny["llama"], name, "generation")
        state = method.initialise()
        moved = {n: t + 0.01 * torch.randn_like(t) for n, t in state.tensors.items()}
        method.export(replace(state, tensors=moved), tmp_path / name)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        assert not (tmp_path / name / "model.safetensors").exists()
        opened = method.open(tmp_path / name).tensors
        assert all(torch.equal(opened[n], tensor) for n, tensor in moved.items()), name
