"""The prefix rules through the verbs of the method: what travels, what is merged; distillation in a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.aggregation.prefix import matched_mean
from fedcustom.aggregation.prefix_stacking import Stacked, stack_prefixes
from fedcustom.core.errors import DataError, RecipeError, UpdateError
from fedcustom.data.examples import ClientData
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.messages import typed
from fedcustom.methods.prefix.distil import Distiller
from fedcustom.methods.prefix.messages import PrefixUpdate
from fedcustom.methods.prefix.settings import PrefixSettings
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import classification_examples, make

SIZES = {"a": 3, "b": 8, "c": 5}


def answers_of(method: WeightTuning, state: State) -> list[Answer]:
    answers = []
    for name, size in SIZES.items():
        task = method.configure(state, 1, {name: Work(epochs=2)})[name]
        update = method.execute(task, Client(name, ClientData(name, classification_examples(size))))
        method.check(task, update)
        answers.append(Answer(name, task, update))
    return answers


def test_matched_prefixes(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", length=4, init="random", merging="matched")
    state = method.initialise()
    answers = answers_of(method, state)
    start = state.tensors["prefix"]
    prefixes = [(start + a.update.tensors["prefix"], a.update.weight) for a in answers]
    # One client's slots in another order change nothing.
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [
        Answer(
            a.client,
            a.task,
            replace(
                a.update,
                tensors=a.update.tensors
                | {"prefix": (start + a.update.tensors["prefix"])[:, :, :, order] - start if n == 1 else
                   a.update.tensors["prefix"]},
            ),
        )
        for n, a in enumerate(answers)
    ]  # fmt: skip
    merged = method.aggregate(state, answers).state.tensors
    again = method.aggregate(state, shuffled).state.tensors
    torch.testing.assert_close(merged["prefix"], again["prefix"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged["prefix"], matched_mean(prefixes, start))
    heads = sum(a.update.weight * a.update.tensors["classifier.weight"] for a in answers) / 16
    torch.testing.assert_close(
        merged["classifier.weight"], state.tensors["classifier.weight"] + heads, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("compression", ["barycentre", "cluster"])
def test_stacking_identical_clients_gives_their_prefix(tiny: dict[str, str], compression: str) -> None:
    method = make(tiny["bert"], "prefix", length=4, init="random", merging="stacked", compression=compression)
    state = method.initialise()
    one = answers_of(method, state)[0]
    merged = method.aggregate(state, [one, Answer("b", one.task, one.update)]).state.tensors["prefix"]
    expected = state.tensors["prefix"] + one.update.tensors["prefix"]
    # Up to the order of slots, which attention does not see.
    for layer in range(len(expected)):
        for head in range(expected.shape[2]):
            found, wanted = merged[layer, :, head], expected[layer, :, head]
            away = (found[0][:, None] - wanted[0][None]).norm(dim=-1).min(dim=1).values
            assert float(away.max()) < 1e-5


def test_only_the_layers_that_changed_most_are_sent(tiny: dict[str, str]) -> None:
    method = make(tiny["bert"], "prefix", length=4, layers_sent=1)
    state = method.initialise()
    answers = answers_of(method, state)
    start = state.tensors["prefix"]
    expected = start.clone()
    for layer in range(len(start)):
        sent = [a for a in answers if typed(a.update, PrefixUpdate).layers == [layer]]
        if sent:
            total = sum(a.update.weight for a in sent)
            expected[layer] += sum(a.update.weight / total * a.update.tensors["prefix"][0] for a in sent)
    assert all(a.update.tensors["prefix"].shape == (1, *start.shape[1:]) for a in answers)
    torch.testing.assert_close(method.aggregate(state, answers).state.tensors["prefix"], expected)
    good = answers[0]
    for layers in ([5], ["0"], [True], [0, 1], "0", None):
        bad = replace(typed(good.update, PrefixUpdate), layers=layers)
        with pytest.raises(UpdateError, match="different numbers below 2"):
            method.check(good.task, bad)


def public_texts(folder: Path, *texts: str) -> str:
    path = folder / "public.txt"
    path.write_text("\n".join(texts))
    return str(path)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_teacher_is_the_model(tiny: dict[str, str], tmp_path: Path, model: str) -> None:
    """With one client's prefix and no bias, the teacher's states are those of PEFT's own forward pass."""
    method = make(tiny[model], "prefix", "generation", length=4, init="random")
    settings = PrefixSettings(merging="stacked", compression="distil", public_text="unused")
    distiller = Distiller(method.base, settings, public_texts(tmp_path, "the cat near a house", "a dog"))
    batch = distiller.batches[0]
    prefix = method.initialise().tensors["prefix"]
    method.trainable.model.eval()
    with torch.no_grad():
        states = distiller._states(batch, prefix, torch.zeros(4), prefix)
        ours = method.base.model.get_output_embeddings()(states)
        theirs = method.trainable.model(**batch).logits[:, -ours.shape[1] :]
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_distillation_comes_closer_to_the_stacked_prefix(
    tiny: dict[str, str], tmp_path: Path, model: str
) -> None:
    method = make(tiny[model], "prefix", length=3, init="random")
    settings = PrefixSettings(
        merging="stacked",
        compression="distil",
        public_text="unused",
        distil_steps=60,
        distil_learning_rate=0.03,
    )
    texts = ["the cat near a house", "a dog", "an old river near the small dog", "house"]
    distiller = Distiller(method.base, settings, public_texts(tmp_path, *texts))
    generator = torch.Generator().manual_seed(0)
    start = method.initialise().tensors["prefix"]
    clients = [(start + torch.randn(start.shape, generator=generator), w) for w in (0.3, 0.7)]
    stacked = stack_prefixes(clients)
    mean = sum(w * prefix for prefix, w in clients)
    assert isinstance(mean, torch.Tensor)

    def error(prefix: torch.Tensor) -> float:
        batch = distiller.batches[0]
        with torch.no_grad():
            teacher = distiller._states(batch, stacked.prefix, stacked.bias[0, 0], start)
            student = distiller._states(batch, prefix, torch.zeros(prefix.shape[3]), start)
        return float((((student - teacher) ** 2) * batch["attention_mask"][:, :, None]).sum())

    assert error(distiller(stacked, mean)) < 0.5 * error(mean)
    same = Stacked(start, torch.zeros_like(stacked.bias[:, :, :3]))
    torch.testing.assert_close(distiller(same, start), start, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "method",
    [
        {"merging": "matched"},
        {"merging": "stacked"},
        {"merging": "stacked", "compression": "cluster"},
        {"layers_sent": 1},
        {"merging": "stacked", "compression": "distil", "distil_steps": 3},
    ],
    ids=["matched", "stacked", "cluster", "layers", "distil"],
)
def test_runs(small: dict[str, Any], tmp_path: Path, method: dict[str, Any]) -> None:
    if method.get("compression") == "distil":
        public = tmp_path / "public.txt"
        public.write_text("the cat\n\na house near the river\n")
        method = {**method, "public_text": str(public)}
    method = {"name": "prefix", "kind": "kv", "length": 4, **method}
    run = fedcustom.run({**small, "method": method}, out=tmp_path / "run")
    again = fedcustom.load(tmp_path / "run").predict(["a cat"])
    assert again == run.predict(["a cat"])
    if "layers_sent" in method:
        assert run.summary["bytes"]["up_per_client_round"] < run.summary["bytes"]["down_per_client_round"]


def begin(method: Any) -> None:
    """As the server does: it alone asks clients for something."""
    method.configure(method.initialise(), 1, {"a": Work(epochs=1)})


KV = {"name": "prefix", "kind": "kv"}


def test_bad_settings(tmp_path: Path, tiny: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="public_text: is needed with merging"):
        load_recipe({"method": {**KV, "merging": "stacked", "compression": "distil"}})
    with pytest.raises(RecipeError, match=r"layers_sent = 2: needs merging = 'mean'"):
        load_recipe({"method": {**KV, "merging": "matched", "layers_sent": 2}})
    with pytest.raises(RecipeError, match=r"layers_sent = 9: .* has 2 layers"):
        make(tiny["bert"], "prefix", layers_sent=9)
    distil = {"merging": "stacked", "compression": "distil"}
    with pytest.raises(DataError, match=r"missing\.txt: cannot be read"):
        begin(make(tiny["bert"], "prefix", public_text=str(tmp_path / "missing.txt"), **distil))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        begin(make(tiny["bert"], "prefix", public_text=str(tmp_path / "empty.txt"), **distil))
