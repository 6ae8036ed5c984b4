"""Weights that the checkpoint lacks are part of every export: plain transformers and peft, in a process of
their own, give the trained outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedcustom.core.errors import ModelError
from helpers.interpreter import run_python
from helpers.lacking import LACKING, lacking_checkpoint
from helpers.methods import SETTINGS, examples_for, make
from helpers.plain import logits, plain_batch
from helpers.rounds import two_rounds

PLAIN = """
import json, sys
sys.modules["fedcustom"] = None
import torch
import transformers as t
from peft import PeftModel
from pathlib import Path
from safetensors.torch import load_file, save_file
folder, base, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = t.AutoConfig.from_pretrained(base)
loader = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM
more = {}
if kind == "classification":
    loader, more = t.AutoModelForSequenceClassification, {"num_labels": 3}
batch, outputs = load_file(folder / "batch.safetensors"), {}
for place in sorted(path for path in folder.iterdir() if path.is_dir()):
    if (place / "adapter_config.json").exists():
        torch.manual_seed(12345)
        model = PeftModel.from_pretrained(loader.from_pretrained(base, **more), str(place))
    else:
        model = loader.from_pretrained(place, trust_remote_code=True)
    rows = []
    with torch.no_grad():
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            given = {"input_ids": batch["input_ids"][row, :length][None]}
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            if config.is_encoder_decoder:
                given["labels"] = batch["labels"][row][None]
            said = model.eval()(**given).logits[0]
            rows.append(said if said.dim() == 1 else said[-1])
    outputs[place.name] = torch.stack(rows)
save_file(outputs, folder / "outputs.safetensors")
"""


def exported(path: str, model: str, kind: str, names: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """Train and export each method; the outputs, row by row, of the trained models in memory."""
    from safetensors.torch import save_file

    folder.mkdir()
    batch = plain_batch(path, kind, model, examples_for(kind)[:3])
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, folder / "batch.safetensors")
    ours = {}
    for name in names:
        method = make(path, name.split()[0], kind, **SETTINGS[name])
        state, _ = two_rounds(method, kind)
        method.export(state, folder / name)
        rows = []
        for row in range(3):
            length = int(batch["attention_mask"][row].sum())
            given = {key: value[row, :length][None] for key, value in batch.items() if key != "labels"}
            if model == "bart" and kind == "generation":
                given["labels"] = batch["labels"][row][None]
            said = logits(method.trainable.model.eval(), given)[0]
            rows.append(said if said.dim() == 1 else said[-1])
        ours[name] = torch.stack(rows)
    return ours


def outputs_elsewhere(folder: Path, path: str, kind: str) -> dict[str, torch.Tensor]:
    done = run_python(PLAIN, str(folder), path, kind)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "outputs.safetensors")


def compare(model: str, names: list[str], tmp_path: Path) -> None:
    path, kind, missing = lacking_checkpoint(model, tmp_path / "base")
    ours = exported(path, model, kind, names, tmp_path / "exported")
    theirs = outputs_elsewhere(tmp_path / "exported", path, kind)
    assert theirs.keys() == ours.keys() == set(names)
    for name in names:
        torch.testing.assert_close(
            theirs[name], ours[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        adapter = tmp_path / "exported" / name / "adapter_model.safetensors"
        if adapter.exists():
            stored = [key.replace(".base_layer.", ".") for key in load_file(adapter)]
            assert all(any(key.endswith(each) for key in stored) for each in missing), name


def test_a_pooler_is_saved_with_an_adapter(tmp_path: Path) -> None:
    compare("bert", ["lora", "prefix", "soft_prompt"], tmp_path)


def test_an_output_layer_is_saved_with_an_adapter(tmp_path: Path) -> None:
    compare("llama", ["lora", "prefix", "soft_prompt"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", LACKING)
def test_every_method(model: str, tmp_path: Path) -> None:
    names = list(SETTINGS)
    if model == "albert":  # takes no keys and values from outside
        names = [name for name in names if "kv" not in SETTINGS[name].values()]
    compare(model, names, tmp_path)


def test_a_weight_inside_an_adapted_layer_is_saved(tmp_path: Path) -> None:
    # The query matrix that LoRA wraps, and a normalisation layer that LN-tuning copies.
    path, kind, _ = lacking_checkpoint("bert", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    from safetensors.torch import save_file

    stored = load_file(file)
    lost = [
        "bert.encoder.layer.1.attention.self.query.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.embeddings.position_embeddings.weight",
    ]
    assert all(stored.pop(name) is not None for name in lost)
    save_file(stored, file, {"format": "pt"})
    names = ["lora", "ln_tuning", "ia3", "prefix"]
    ours = exported(path, "bert", kind, names, tmp_path / "exported")
    theirs = outputs_elsewhere(tmp_path / "exported", path, kind)
    for name in names:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-5, atol=1e-6)


def test_an_exported_model_opens_again_whatever_was_drawn(tmp_path: Path) -> None:
    path, kind, _ = lacking_checkpoint("bert", tmp_path / "base")
    method = make(path, "lora", kind, **SETTINGS["lora"])
    state, _ = two_rounds(method, kind)
    method.export(state, tmp_path / "model")
    batch = plain_batch(path, kind, "bert", examples_for(kind)[:3])
    expected = logits(method.trainable.model.eval(), batch)
    again = make(path, "lora", kind, **SETTINGS["lora"])
    with torch.no_grad():
        again.base.model.bert.pooler.dense.weight.normal_()
    again.trainable.write(again.open(tmp_path / "model").tensors)
    torch.testing.assert_close(logits(again.trainable.model.eval(), batch), expected)


def test_the_loading_report(tmp_path: Path) -> None:
    path, kind, _ = lacking_checkpoint("bert", tmp_path / "base")
    report = make(path, "lora", kind, rank=4).base.loading
    assert set(report.initialised) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert set(report.unexpected) == {
        "cls.predictions.bias", "cls.predictions.transform.dense.weight",
        "cls.predictions.transform.dense.bias", "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.LayerNorm.bias",
    }  # fmt: skip
    assert report.concerns_body
    words = report.in_words()
    assert "2 weights of the head newly initialised (classifier)" in words
    assert "2 weights that the checkpoint lacks newly initialised (bert.pooler.dense" in words
    assert "5 weights of the checkpoint not used (cls.predictions, " in words


def with_configuration(folder: str, **changes: Any) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path, kind, _ = lacking_checkpoint("bert", tmp_path / "base")
    with_configuration(path, intermediate_size=50)
    with pytest.raises(ModelError) as error:
        make(path, "lora", kind, rank=4)
    words = str(error.value)
    assert "bert.encoder.layer.0.intermediate.dense.bias has shape (48,) in the checkpoint and (50,)" in words
    assert "so have 5 more weights" in words
    assert "\n" not in words


def test_a_head_of_another_shape_is_replaced(tmp_path: Path) -> None:
    import transformers as t

    path, kind, _ = lacking_checkpoint("bert", tmp_path / "base")
    torch.manual_seed(1)
    t.AutoModelForSequenceClassification.from_pretrained(path, num_labels=5).save_pretrained(path)
    method = make(path, "lora", kind, rank=4)
    report = method.base.loading
    assert report.mismatched == ("classifier.bias", "classifier.weight")
    assert "2 of them of another shape in the checkpoint" in report.in_words()
    state, _ = two_rounds(method, kind)
    method.export(state, tmp_path / "model")
    from fedcustom.methods.tuning.export_check import check_export

    assert check_export(tmp_path / "model", method.reference(state, examples_for(kind))) == ""
