"""Preference tuning against a DPO loss by hand, on plain ``transformers`` and ``peft`` models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedcustom.core.tensors import Tensors, equal
from fedcustom.data.examples import Example
from fedcustom.data.tokens import TokenizedExample, of_one_length
from fedcustom.methods import WeightTuning
from fedcustom.methods.tuning.preference_objective import Preference
from fedcustom.models import checkpointing as recomputing
from helpers.methods import ALONE, SETTINGS, SINGLE, make, preference_examples
from helpers.rounds import distance, rounds

BETA, SMOOTHING = 1.0, 0.1
TRAINING = {"beta": BETA, "label_smoothing": SMOOTHING}

APART = ("prefix", "prefix matched", "prefix stacked", "prefix reparametrised", "soft_prompt")
"""What changes the model from the start (with all that begins with ``soft_prompt``)."""


def likelihood(model: Any, source: Any, target: Any, *, seq2seq: bool) -> torch.Tensor:
    """The log-likelihood of one answer, alone in its batch."""
    prompt, answer = torch.tensor(source.tolist()), torch.tensor(target.tolist())
    if seq2seq:
        logits = model(input_ids=prompt[None], labels=answer[None]).logits[0]
    else:
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()


def by_hand(model: Any, reference: Any, rows: list[TokenizedExample], *, seq2seq: bool) -> torch.Tensor:
    """Rafailov et al. 2023, eq. 7, with label smoothing, as it stands there: the mean over pairs."""
    total = torch.zeros(())
    for row in rows:
        assert row.rejected is not None
        ratios = []
        for answer in (row.target, row.rejected.target):
            with torch.no_grad():
                fixed = likelihood(reference, row.source, answer, seq2seq=seq2seq)
            ratios.append(likelihood(model, row.source, answer, seq2seq=seq2seq) - fixed)
        h = BETA * (ratios[0] - ratios[1])
        right, wrong = torch.log(torch.sigmoid(h)), torch.log(torch.sigmoid(-h))
        total = total - (1 - SMOOTHING) * right - SMOOTHING * wrong
    return total / len(rows)


def plain(path: str, model: str) -> Any:
    import transformers

    kind = transformers.AutoModelForSeq2SeqLM if model == "bart" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def perturbed(method: WeightTuning, size: float = 0.05) -> Tensors:
    """Other tensors, written into the method's model."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in method.trainable.read().items()
    }
    method.trainable.write(tensors)
    return tensors


def pairs(method: WeightTuning, examples: list[Example] | None = None) -> list[TokenizedExample]:
    return method.tokens(preference_examples() if examples is None else examples)


def gradients(method: WeightTuning, loss: torch.Tensor) -> Tensors:
    parameters = method.trainable.parameters
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
    return dict(zip(parameters, zeros, strict=True))


def gap(one: Tensors, other: Tensors) -> float:
    """How far gradients are apart, relative to all of them together."""
    assert one.keys() == other.keys()
    size = math.sqrt(sum(float(t.square().sum()) for t in other.values()))
    return math.sqrt(sum(float((one[n] - other[n]).square().sum()) for n in other)) / size


def test_lora_is_exact_against_plain_peft(tiny: dict[str, str]) -> None:
    import peft

    method = make(tiny["llama"], "lora", "preference", rank=4, training=TRAINING)
    perturbed(method)
    rows = pairs(method)
    objective = method.objective
    loss = objective.loss(method.trainable.model, objective.collate(rows))
    ours = gradients(method, loss)

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16)
    model = peft.get_peft_model(plain(tiny["llama"], "llama"), config).eval()
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(method.trainable.parameters[name])
    reference = plain(tiny["llama"], "llama")
    with torch.no_grad(), model.disable_adapter():  # the adapter off is the plain base
        off = likelihood(model, rows[0].source, rows[0].target, seq2seq=False)
        same = likelihood(reference, rows[0].source, rows[0].target, seq2seq=False)
    assert float(off) == float(same)
    expected = by_hand(model, reference, rows, seq2seq=False)
    assert abs(float(expected) - math.log(2)) > 1e-3
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    wanted = dict(zip(theirs, torch.autograd.grad(expected, list(theirs.values())), strict=True))
    assert gap(ours, wanted) < 1e-5


@pytest.mark.parametrize("model", ["llama", "bart"])
@pytest.mark.parametrize(
    "name", ["prefix memory", "prefix", "soft_prompt", "full", "adapter", "ia3", "bitfit"]
)
def test_losses_and_gradients_are_those_by_hand(tiny: dict[str, str], name: str, model: str) -> None:
    """The method's own model is passed row by row, without padding; the reference is a plain model."""
    method = make(tiny[model], name.split()[0], "preference", **SETTINGS[name], training=TRAINING)
    method.base.model.double()  # so that sums in another order round alike
    perturbed(method, 0.05 if name == "full" else 1.0)
    rows, objective, tuned = pairs(method), method.objective, method.trainable.model
    loss = objective.loss(tuned, objective.collate(rows))
    ours = gradients(method, loss)
    expected = by_hand(tuned, plain(tiny[model], model).double(), rows, seq2seq=model == "bart")
    assert abs(float(expected) - math.log(2)) > 5e-5
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert gap(ours, gradients(method, expected)) < 1e-5


@pytest.mark.parametrize("model", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_reference_is_the_base_whatever_the_state(tiny: dict[str, str], name: str, model: str) -> None:
    method = make(tiny[model], name.split()[0], "preference", **SETTINGS[name])
    starts_as_base = name not in APART and not name.startswith("soft_prompt")
    assert (method.trainable.base_model is None) == starts_as_base
    examples = preference_examples()
    said = method.predict(method.initialise(), examples, texts=False).scores
    if starts_as_base:  # to the bit
        assert said[:, 0].tolist() == [math.log(2)] * len(examples)
        assert not said[:, 1].any()
    perturbed(method)
    before = method.trainable.read()
    again = pairs(method, preference_examples())
    assert equal(before, method.trainable.read())
    base = plain(tiny[model], model)
    for row, first in zip(again, pairs(method, examples), strict=True):
        assert row.rejected is not None
        assert first.rejected is not None
        assert row.rejected.reference == first.rejected.reference
        with torch.no_grad():
            wanted = [
                float(likelihood(base, row.source, answer, seq2seq=model == "bart"))
                for answer in (row.target, row.rejected.target)
            ]
        assert row.rejected.reference == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("model", ["llama", "bart"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ALONE])
def test_a_cohort_is_trained_as_its_clients_one_by_one(tiny: dict[str, str], name: str, model: str) -> None:
    training = {**TRAINING, "batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}
    options: dict[str, Any] = {**SETTINGS[name], "training": training}
    technique, double = name.split()[0], name not in SINGLE
    first = make(tiny[model], technique, "preference", **options)
    alone = rounds(first, "preference", together=False, double=double)
    method = make(tiny[model], technique, "preference", **options)
    assert method.widest_cohort() > 1
    together = rounds(method, "preference", together=True, double=double)
    for before, after in zip(alone, together, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < 1e-5, client
            assert update.loss == pytest.approx(after[client].loss, rel=1e-5)
            assert update.examples == after[client].examples  # pairs, and not answers


@pytest.mark.parametrize(
    ("name", "together"), [("lora", True), ("lora", False), ("prefix memory", True), ("prefix", True)]
)
def test_recomputed_layers_give_the_same(tiny: dict[str, str], name: str, together: bool) -> None:
    found, layers = [], recomputing.checkpointed_layers
    for switched in (False, True):
        training = {**TRAINING, "batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1}
        training["gradient_checkpointing"] = switched
        method = make(tiny["llama"], name.split()[0], "preference", **SETTINGS[name], training=training)
        assert layers(method.trainable.model)
        found.append(rounds(method, "preference", together=together, double=True))
    for before, after in zip(*found, strict=True):
        assert all(distance(update, after[client]) < 1e-9 for client, update in before.items())


def test_without_padding_both_answers_are_of_one_length(tiny: dict[str, str]) -> None:
    method = make(tiny["llama"], "lora", "preference", rank=4)
    rows = pairs(method)
    groups = of_one_length(rows)
    assert sorted(place for group in groups for place in group) == list(range(len(rows)))
    for group in groups:
        lengths = {(len(rows[i].source), len(rows[i].target), rows[i].length) for i in group}
        assert len(lengths) == 1
    objective = method.objective
    assert isinstance(objective, Preference)
    unpadded = replace(method.base, padding="none")
    perturbed(method)
    objective.base = unpadded
    alone = objective.predict(method.trainable.model, rows, method.context.evaluation, texts=False)
    objective.base = method.base
    padded = objective.predict(method.trainable.model, rows, method.context.evaluation, texts=False)
    assert np.abs(alone.scores - padded.scores).max() < 1e-4
