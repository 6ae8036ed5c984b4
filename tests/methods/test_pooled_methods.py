"""Every method that trains tensors on a classifier of pooled states."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcustom.core.errors import ModelError
from fedcustom.data.examples import Example
from fedcustom.models.pooled_classifier import PooledClassifier
from helpers.methods import ALONE, LABELS, SETTINGS, SINGLE, classification_examples, examples_for, make
from helpers.plain import logits, plain_batch
from helpers.rounds import distance, rounds, two_rounds
from helpers.tiny_models import sentence_files

KIND = "classification"
METHODS = {**SETTINGS, "probe": {}}
NO_OPS = (
    "lora", "lora rslora", "lora private", "lora dora", "lora ffa", "adapter", "ia3", "bitfit", "full",
    "probe",
)  # fmt: skip
"""What claims to change nothing before it is trained."""


def plain(folder: str, skip: int = 0) -> Any:
    """The classifier as somebody loads it who has a copy of its code, with the head that all begin with."""
    torch.manual_seed(0)
    return PooledClassifier.from_encoder(folder, LABELS, pooling="mean", normalize=True, skip=skip).eval()


@pytest.mark.parametrize("name", list(METHODS))
def test_together_is_as_one_by_one(sentence: str, name: str) -> None:
    technique, double = name.split()[0], name not in SINGLE
    training = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}
    options: dict[str, Any] = {**METHODS[name], "training": training}
    alone = rounds(make(sentence, technique, **options), KIND, together=False, double=double)
    method = make(sentence, technique, **options)
    assert isinstance(method.base.model, PooledClassifier)
    assert (method.widest_cohort() == 1) == (name in ALONE)
    together = rounds(method, KIND, together=True, double=double)
    for before, after in zip(alone, together, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < (1e-7 if double else 1e-5), client
            assert update.loss == pytest.approx(after[client].loss, rel=1e-5)


@pytest.mark.parametrize("name", NO_OPS)
def test_an_adapter_starts_as_nothing(sentence: str, name: str) -> None:
    method = make(sentence, name.split()[0], **METHODS[name])
    method.trainable.write(method.ownership.complete(method.initialise().tensors))
    batch = plain_batch(sentence, KIND, "bert", classification_examples(5))
    batch.pop("labels")
    found, expected = logits(method.trainable.model.eval(), batch), logits(plain(sentence), batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_saved_is_opened(sentence: str, tmp_path: Path, name: str) -> None:
    """By this package, and by those of the ecosystem on the classifier's own code."""
    technique = name.split()[0]
    method = make(sentence, technique, **METHODS[name])
    state, _ = two_rounds(method, KIND)
    method.export(state, tmp_path / "model")
    batch = plain_batch(sentence, KIND, "bert", examples_for(KIND)[:3])
    ours = logits(method.trainable.model.eval(), batch)
    if (tmp_path / "model" / "adapter_config.json").exists():
        from peft import PeftModel

        base = plain(sentence, method.base.model.config.skip)
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "model")).eval()
    else:
        from transformers import AutoModelForSequenceClassification as Loader

        theirs = Loader.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=1e-4, atol=1e-5)
    again = make(sentence, technique, **METHODS[name])
    opened = again.open(tmp_path / "model")
    again.trainable.write(again.ownership.complete(opened.tensors))
    torch.testing.assert_close(logits(again.trainable.model.eval(), batch), ours, rtol=1e-4, atol=1e-5)


def test_a_folder_written_without_shifts_is_told(sentence: str, tmp_path: Path) -> None:
    """And one with them: a pooled classifier's folder holds its encoder's configuration."""
    for written in (False, True):
        method = make(sentence, "prefix", length=12, query_shifts=written)
        method.export(method.initialise(), tmp_path / str(written))
        other = make(sentence, "prefix", length=12, query_shifts=not written)
        with pytest.raises(ModelError, match=f"query_shifts = {str(written).lower()}; set that"):
            other.open(tmp_path / str(written))


@pytest.mark.parametrize(
    "name", ["prefix", "soft_prompt", "lora", "adapter", "ia3", "bitfit", "full", "probe"]
)
def test_padding_changes_no_prediction(sentence: str, name: str) -> None:
    method = make(sentence, name, **METHODS[name])
    examples = [Example("cat", label=0), Example("the old dog near a small house and then a river", label=1)]
    state, _ = two_rounds(method, KIND)
    together = method.predict(state, examples, texts=False).scores
    for row, example in zip(together, examples, strict=True):
        alone = method.predict(state, [example], texts=False).scores[0]
        assert row == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", ["prefix", "soft_prompt", "lora"])
def test_pooled_by_the_first_token(tiny: dict[str, str], tmp_path: Path, name: str) -> None:
    """Of the text, not of a prompt in front of it; the last layer is computed for that token alone."""
    folder = shutil.copytree(tiny["bert"], tmp_path / "first")
    sentence_files(folder, {"pooling_mode_cls_token": True}, normalize=True)
    method = make(str(folder), name, **METHODS[name])
    state, _ = two_rounds(method, KIND)
    examples = classification_examples(5)
    found = method.predict(state, examples, texts=False).scores
    batch = plain_batch(str(folder), KIND, "bert", examples)
    batch.pop("labels")
    method.trainable.write(method.ownership.complete(state.tensors))
    model, seen = method.base.model, []
    hook = model.encoder.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    expected = logits(method.trainable.model.eval(), batch)
    hook.remove()
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    at = model.config.skip
    assert (at > 0) == (name == "soft_prompt")
    vectors = torch.nn.functional.normalize(seen[0][:, at], dim=1)
    head = {n.rpartition(".")[2]: t for n, t in state.tensors.items() if "classifier" in n}
    torch.testing.assert_close(expected, vectors @ head["weight"].T + head["bias"], atol=1e-5, rtol=1e-5)


def test_a_prefix_is_attended_to_and_not_pooled(sentence: str) -> None:
    """A prefix of a text's own keys and values: the states of what follows, pooled without the text's."""
    method = make(sentence, "prefix", length=3, init="random")
    batch = plain_batch(sentence, KIND, "bert", classification_examples(4))
    batch.pop("labels")
    model = method.base.model
    seen: list[torch.Tensor] = []
    hook = model.encoder.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    found = logits(method.trainable.model.eval(), batch)
    hook.remove()
    (states,) = seen
    assert states.shape[:2] == batch["input_ids"].shape
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    head = {
        name.rpartition(".")[2]: t for name, t in method.initialise().tensors.items() if "classifier" in name
    }
    torch.testing.assert_close(found, vectors @ head["weight"].T + head["bias"], atol=1e-6, rtol=1e-5)
    assert float((found - logits(plain(sentence), batch)).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_lower_layers_are_computed_once(sentence: str, name: str) -> None:
    """With method.first_layer, to the same updates."""
    training = {"batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1}
    results = []
    for first_layer in (0, 1):
        method = make(sentence, name, training=training, **METHODS[name], first_layer=first_layer)
        results.append((method, rounds(method, KIND, together=False)))
    assert set(results[1][0].initialise().tensors) < set(results[0][0].initialise().tensors)
    again = make(sentence, name, training=training, **METHODS[name], first_layer=1)
    for before, after in zip(results[1][1], rounds(again, KIND, together=True), strict=True):
        assert all(distance(update, after[client]) < 1e-5 for client, update in before.items())
