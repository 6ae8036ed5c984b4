"""Exported prefix memories: saved again, loaded by hand, and folded into feed-forward slots."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcustom.core.errors import DataError, ModelError
from fedcustom.methods import State, WeightTuning
from fedcustom.methods.prefix import fold as folding
from fedcustom.methods.prefix.fold import fold, read_texts, write_folded
from fedcustom.models.load import Base, load_base
from fedcustom.models.pooled_classifier import PooledClassifier
from fedcustom.models.settings import ModelSettings
from helpers.methods import MODELS, examples_for, make
from helpers.plain import logits, plain, plain_batch
from helpers.rows import make_rows

KINDS = {**MODELS, "sentence": "classification"}


@pytest.fixture(scope="module")
def folders(tiny: dict[str, str], sentence: str) -> dict[str, str]:
    return {**tiny, "sentence": sentence}


def memory(path: str, model: str, *, scale: float = 1.0, **settings: Any) -> tuple[WeightTuning, State]:
    """A method, and a state of it whose slots add something."""
    method = make(path, "prefix", KINDS[model], kind="memory", length=8, **settings)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        n: t if n in method.trainable.head else t + scale * torch.randn(t.shape, generator=generator)
        for n, t in method.initialise().tensors.items()
    }
    return method, State(tensors)


def loader(model: str) -> Any:
    import transformers as t

    if KINDS[model] == "classification":
        return t.AutoModelForSequenceClassification
    return t.AutoModelForSeq2SeqLM if model == "bart" else t.AutoModelForCausalLM


@pytest.mark.parametrize("model", ["sentence", "llama", "bart"])
def test_a_loaded_model_is_saved_and_loaded_again(
    folders: dict[str, str], model: str, tmp_path: Path
) -> None:
    method, state = memory(folders[model], model)
    method.export(state, tmp_path / "model")
    batch = plain_batch(folders[model], KINDS[model], model, examples_for(KINDS[model])[:4])
    expected = logits(method.with_state(state).eval().double(), batch)
    folder = tmp_path / "model"
    for number in (1, 2):
        found = loader(model).from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(
            logits(copy.deepcopy(found).double(), batch), expected, rtol=1e-6, atol=1e-6
        )
        assert any(".slots." in name for name in found.state_dict())
        folder = tmp_path / f"again-{number}"
        found.save_pretrained(folder)


@pytest.mark.parametrize("model", ["sentence", "llama", "bart"])
def test_no_class_without_slots_takes_the_folder(folders: dict[str, str], model: str, tmp_path: Path) -> None:
    method, state = memory(folders[model], model)
    method.export(state, tmp_path / "model")
    with pytest.raises(ValueError, match="trust_remote_code"):
        loader(model).from_pretrained(tmp_path / "model", trust_remote_code=False)
    if model == "sentence":
        with pytest.raises(ValueError, match=r"is no 'pooled-classifier'.*trust_remote_code=True"):
            PooledClassifier.from_pretrained(tmp_path / "model")


def untouched(path: str, method: WeightTuning) -> Base:
    return load_base(ModelSettings(base=path), method.base.task, seed=0)


TEXTS = [row["text"] for row in make_rows(120, 5)]


@pytest.mark.parametrize("model", ["sentence", "gpt2", "llama", "bart"])
def test_folding_imitates_the_memory(
    folders: dict[str, str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the error is that of a memory without attention slots; after, it is less; both are computed
    from the folder that is written.
    """
    method, state = memory(folders[model], model, scale=0.5)
    teacher = method.with_state(state).eval()
    base = untouched(folders[model], method)
    said: list[str] = []
    monkeypatch.setattr(folding, "EVERY", 0.0)
    folded = fold(base, method.trainable, TEXTS, None, 0, said.append)
    assert len(said) == 1 + folding.STEPS
    assert said[0].startswith("distilling the slots on 120 texts in 400 steps")
    assert said[-1].startswith("distilling: step 400 of 400, relative error 0.")
    own, more = (
        sum(p.numel() for n, p in of.parameters.items() if n not in method.trainable.head)
        for of in (method.trainable, folded.trainable)
    )
    assert abs(more - own) <= 0.51 * more / folded.slots
    assert (folded.trained, folded.held_out) == (108, 12)
    assert folded.after < 0.9 * folded.before  # with one unit more (llama) 0.86, with several below 0.7
    write_folded(folded, base, tmp_path / "model")
    assert not [f for f in (tmp_path / "model").glob("*.py") if "prefix" in f.name]
    assert f"{folded.after:.4f} after distillation" in (tmp_path / "model" / "README.md").read_text()
    found = plain(tmp_path / "model", KINDS[model], model)
    assert [n for n in found.state_dict() if "slots" in n or "adapter" in n] == []

    def states(of: Any, ids: Tensor) -> Tensor:
        body, given = getattr(of, of.base_model_prefix), {}
        if model == "bart":
            given = {"decoder_input_ids": ids}
        with torch.no_grad():
            result: Tensor = body(input_ids=ids, **given).last_hidden_state
        return result

    gap = size = 0.0
    for text in TEXTS[::10]:
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        wanted = states(teacher, ids)
        gap += float((states(found, ids) - wanted).square().sum())
        size += float(wanted.square().sum())
    assert (gap / size) ** 0.5 == pytest.approx(folded.after, rel=1e-3)


def test_what_cannot_be_folded_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    method, state = memory(folders["bert"], "bert", feed_forward_slots=3)
    method.with_state(state)
    with pytest.raises(ModelError, match=r"--slots 2: the memory has 3 .* allowed: 3 or more"):
        fold(untouched(folders["bert"], method), method.trainable, TEXTS, 2, seed=0)
    (tmp_path / "one.txt").write_text("one text\n\n")
    with pytest.raises(DataError, match="holds 1 texts; allowed: 2 or more"):
        read_texts(tmp_path / "one.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")


def test_a_folder_written_without_shifts_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    """As runs of decoders are that were finished before memories had any."""
    before, state = memory(folders["llama"], "llama", query_shifts=False)
    before.export(state, tmp_path / "model")
    file = tmp_path / "model/config.json"
    values = json.loads(file.read_text())
    del values["prefix_memory"]["shifts"]
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"was written with method\.query_shifts = false; set that"):
        memory(folders["llama"], "llama")[0].open(tmp_path / "model")
    again = before.open(tmp_path / "model").tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in state.tensors.items())
