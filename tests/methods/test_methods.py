"""Each method against a plain training step with PEFT, and what travels against what was declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcustom.core.errors import ModelError, UpdateError
from fedcustom.core.seeds import name_seed
from fedcustom.core.tensors import add, equal
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.data.tokens import example_order
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods import Answer, Client, Work, registry
from fedcustom.methods.messages import typed
from fedcustom.methods.prefix.init import text_prefix
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from helpers.methods import (
    LABELS,
    RATE,
    TECHNIQUES,
    classification_examples,
    examples_for,
    generation_examples,
    make,
)


def plain_losses(path: str, method: str, kind: str, examples: list[Example], steps: int) -> list[float]:
    """The losses of a plain loop with PEFT's own configuration, batches of four in the client's order."""
    import peft
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    configuration = transformers.AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    if kind == "classification":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
        task = "SEQ_CLS"
    elif configuration.is_encoder_decoder:
        model, task = transformers.AutoModelForSeq2SeqLM.from_pretrained(path), "SEQ_2_SEQ_LM"
    else:
        model, task = transformers.AutoModelForCausalLM.from_pretrained(path), "CAUSAL_LM"
    torch.manual_seed(0)
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=8, lora_alpha=16))
    elif method == "soft_prompt":
        config = peft.PromptTuningConfig(
            task_type=task, num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"
        )
        model = peft.get_peft_model(model, config)
    elif method == "prefix":
        model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4))
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    order = example_order(len(examples), 0, 4 * steps, [0, 5, name_seed("here")])
    losses = []
    for step in range(steps):
        chosen = [examples[i] for i in order[4 * step : 4 * step + 4]]
        batch = tokenizer(
            [e.text for e in chosen], padding=True, return_tensors="pt", return_token_type_ids=False
        )
        if kind == "classification":
            labels = torch.tensor([e.label for e in chosen])
        elif configuration.is_encoder_decoder:
            targets = [e.target + tokenizer.eos_token for e in chosen]
            padded = tokenizer(targets, padding=True, return_tensors="pt")
            labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        else:
            whole = [f"{e.text}{e.target}{tokenizer.eos_token}" for e in chosen]
            batch = tokenizer(whole, padding=True, return_tensors="pt", return_token_type_ids=False)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            for row, e in enumerate(chosen):
                labels[row, : len(tokenizer(e.text)["input_ids"])] = -100
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


GRID = [
    (model, kind, method)
    for model, kind in [
        ("bert", "classification"), ("llama", "classification"), ("gpt2", "classification"),
        ("llama", "generation"), ("gpt2", "generation"), ("bart", "generation"),
    ]
    for method in ("full", "lora", "soft_prompt", "prefix")
    # PEFT reads a decoder's soft-prompted answer off the padding; ours does not (tested below).
    if (kind, method) != ("classification", "soft_prompt") or model == "bert"
]  # fmt: skip


@pytest.mark.parametrize(("model", "kind", "method"), GRID, ids=["-".join(entry) for entry in GRID])
def test_training_equals_a_plain_loop(tiny: dict[str, str], model: str, kind: str, method: str) -> None:
    more = {"prefix": {"length": 4, "init": "random"}, "soft_prompt": {"length": 4}}.get(method, {})
    examples = examples_for(kind)
    expected = plain_losses(tiny[model], method, kind, examples, steps=4)
    for steps in (1, 4):
        ours = make(tiny[model], method, kind, **more)
        state = ours.initialise()
        client = Client("here", ClientData("here", examples))
        update = ours.execute(ours.configure(state, 1, {"here": Work(steps=steps)})["here"], client)
        assert typed(update, TrainUpdate).loss == pytest.approx(sum(expected[:steps]) / steps, abs=1e-5)
        assert update.steps == steps
        ours.check(TrainTask(state.tensors, round_number=1, work=Work(steps=steps)), update)
        changed = {name for name, tensor in update.tensors.items() if tensor.any()}
        unused = {name for name in state.tensors if "position" in name or "embed" in name or "pooler" in name}
        assert changed >= state.tensors.keys() - unused or steps == 1


@pytest.mark.parametrize("method", TECHNIQUES)
def test_only_the_declared_tensors_change(tiny: dict[str, str], method: str) -> None:
    ours = make(tiny["bert"], method)
    everything = {name: p.detach().clone() for name, p in ours.trainable.model.named_parameters()}
    client = Client("here", ClientData("here", classification_examples()))
    ours.execute(ours.configure(ours.initialise(), 1, {"here": Work(epochs=2)})["here"], client)
    trained = {id(p) for p in ours.trainable.parameters.values()}
    for name, parameter in ours.trainable.model.named_parameters():
        if id(parameter) not in trained:
            assert torch.equal(parameter, everything[name]), name
            assert parameter.grad is None


def test_sizes(tiny: dict[str, str]) -> None:
    head = 32 * 3 + 3
    prefix = make(tiny["bert"], "prefix", kind="kv", length=5)
    assert prefix.sizes(prefix.initialise()) == (2 * 2 * 32 * 5, head)
    assert prefix.initialise().tensors["prefix"].shape == (2, 2, 4, 5, 8)
    grouped = make(tiny["llama"], "prefix", "generation", kind="kv", length=5)
    assert grouped.initialise().tensors["prefix"].shape == (2, 2, 2, 5, 8)  # two key-value heads, not four
    lora = make(tiny["bert"], "lora", rank=3)
    assert lora.sizes(lora.initialise()) == (2 * 2 * (3 * 32 + 32 * 3), head)
    soft = make(tiny["bert"], "soft_prompt", length=7)
    assert soft.sizes(soft.initialise()) == (7 * 32, head)
    full = make(tiny["bert"], "full")
    own, top = full.sizes(full.initialise())
    assert top == head
    assert own == sum(p.numel() for name, p in full.base.model.named_parameters() if "classifier" not in name)


def test_all_methods_begin_with_the_same_head(tiny: dict[str, str]) -> None:
    heads = [make(tiny["bert"], method).initialise().tensors["classifier.weight"] for method in TECHNIQUES]
    assert all(torch.equal(heads[0], head) for head in heads)


def test_a_zero_prefix_changes_little_and_a_text_prefix_is_the_texts_cache(tiny: dict[str, str]) -> None:
    zero = make(tiny["llama"], "prefix", "generation", length=3, init="zero")
    assert zero.initialise().tensors["prefix"].abs().max() == 0
    ours = make(
        tiny["llama"], "prefix", "generation", length=6, init="text", init_text="the cat sees a dog and then"
    )
    model = ours.base.model
    tokens = [1, *ours.base.tokenizer("the cat sees a dog and then")["input_ids"]][:6]
    more = ours.base.tokenizer(" bread")["input_ids"]
    # The model with the prefix continues exactly as the plain model does after the text itself.
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([[*tokens, *more]])).logits[:, len(tokens) :]
        with_prefix = ours.trainable.model(
            input_ids=torch.tensor([more]), attention_mask=torch.ones(1, len(more), dtype=torch.long)
        ).logits
    torch.testing.assert_close(with_prefix, plain, rtol=1e-4, atol=1e-5)


def test_a_short_text_is_repeated(tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny["bert"]), LearningTask("classification", LABELS), 0)
    assert text_prefix(base, "cat", 7).shape == (2, 2, 4, 7, 8)


def test_reparametrisation_stays_at_the_client(tiny: dict[str, str]) -> None:
    plain = make(tiny["bert"], "prefix", kind="kv", length=4)
    through = make(tiny["bert"], "prefix", length=4, reparametrise=True, reparametrise_width=16)
    state = through.initialise()
    assert equal(state.tensors, plain.initialise().tensors)  # the network starts as nothing
    client = Client("here", ClientData("here", classification_examples()))
    update = through.execute(through.configure(state, 1, {"here": Work(epochs=3)})["here"], client)
    assert update.tensors.keys() == plain.initialise().tensors.keys()
    assert update.tensors["prefix"].any()
    # What was sent acts without the network as it did with it.
    batch = through.base.tokenizer(["the cat near a house"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        trained = through.trainable.model(**batch).logits
        plain.trainable.write(add(state.tensors, update.tensors))
        torch.testing.assert_close(plain.trainable.model(**batch).logits, trained)


@pytest.mark.parametrize("method", TECHNIQUES)
@pytest.mark.parametrize(
    ("model", "kind"), [("bert", "classification"), ("llama", "classification"), ("gpt2", "classification")]
)
def test_padding_does_not_change_predictions(
    tiny: dict[str, str], model: str, kind: str, method: str
) -> None:
    ours = make(tiny[model], method, kind)
    ours.context = ours.context.__class__(
        **{**vars(ours.context), "evaluation": EvaluationSettings(batch_size=8)}
    )
    examples = [Example("cat", label=0), Example("the old dog near a small house and then a river", label=1)]
    together = ours.predict(ours.initialise(), examples, texts=False).scores
    alone = [ours.predict(ours.initialise(), [example], texts=False).scores[0] for example in examples]
    for row, expected in zip(together, alone, strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "method", [name for name in TECHNIQUES if "generation" in registry.settings_of(name).tasks]
)
@pytest.mark.parametrize("model", ["llama", "gpt2", "bart"])
def test_texts_written_in_a_batch_equal_those_written_alone(
    tiny: dict[str, str], model: str, method: str
) -> None:
    ours = make(tiny[model], method, "generation", training={"learning_rate": 0.05})
    examples = generation_examples(12)
    client = Client("here", ClientData("here", examples))
    start = ours.initialise()
    task = ours.configure(start, 1, {"here": Work(epochs=4)})["here"]
    state = ours.aggregate(start, [Answer("here", task, ours.execute(task, client))]).state
    mixed = [
        Example("cat", target=" x"),
        *examples[:3],
        Example("the old dog near a small house :", target=" y"),
    ]
    together = ours.predict(state, mixed, texts=True).texts
    alone = [(ours.predict(state, [example], texts=True).texts or [""])[0] for example in mixed]
    assert together == alone


def test_models_that_take_no_prefix_are_refused(tmp_path: Path, tiny: dict[str, str]) -> None:
    import transformers

    config = transformers.DistilBertConfig(vocab_size=400, dim=32, n_layers=1, n_heads=4, hidden_dim=48)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny["bert"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"method prefix does not fit .* use method soft_prompt or lora"):
        make(str(tmp_path), "prefix", kind="kv")
    assert make(str(tmp_path), "lora").sizes(make(str(tmp_path), "lora").initialise())[1] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("prefix"), "wrong tensor names: prefix"),
        (lambda t: t.update(extra=torch.ones(1)), "wrong tensor names: extra"),
        (lambda t: t.update(prefix=t["prefix"][:1]), "prefix has shape"),
        (lambda t: t.update(prefix=t["prefix"].double()), "prefix has dtype"),
        (lambda t: t["prefix"].view(-1)[3:4].fill_(float("nan")), "not finite"),
        (lambda t: t["classifier.bias"].fill_(float("inf")), "not finite"),
    ],
)
def test_unsound_updates_are_refused(tiny: dict[str, str], change: Any, message: str) -> None:
    ours = make(tiny["bert"], "prefix", kind="kv")
    task = TrainTask(ours.initialise().tensors, round_number=1)
    tensors = ours.initialise().tensors
    ours.check(task, TrainUpdate(tensors, 3.0, loss=1.0, steps=2, examples=3))
    change(tensors)
    with pytest.raises(UpdateError, match=message):
        ours.check(task, TrainUpdate(tensors, 3.0, loss=1.0, steps=2, examples=3))


@pytest.mark.parametrize(
    ("weight", "loss", "steps", "message"),
    [
        (0.0, 1.0, 1, "weight"),
        (-1.0, 1.0, 1, "weight"),
        (float("inf"), 1.0, 1, "weight"),
        (1.0, float("nan"), 1, "loss"),
        (1.0, 1.0, 0, "steps"),
        (1.0, 1.0, 2.5, "steps"),
        (1.0, 1.0, None, "steps"),
        (4.0, 1.0, 5, "steps 5: must be an integer from 1 to 3"),
    ],
)
def test_unsound_numbers_are_refused(
    tiny: dict[str, str], weight: float, loss: float, steps: Any, message: str
) -> None:
    ours = make(tiny["bert"], "prefix")
    task = TrainTask(ours.initialise().tensors, round_number=1)
    with pytest.raises(UpdateError, match=message):
        ours.check(task, TrainUpdate(ours.initialise().tensors, weight, loss=loss, steps=steps, examples=3))


def test_merging_is_the_mean_by_examples(tiny: dict[str, str]) -> None:
    ours = make(tiny["bert"], "lora")
    state = ours.initialise()
    sizes = {"a": 3, "b": 8}
    answers = []
    for name, size in sizes.items():
        client = Client(name, ClientData(name, classification_examples(size)))
        task = ours.configure(state, 1, {name: Work(epochs=1)})[name]
        answers.append(Answer(name, task, ours.execute(task, client)))
    merged = ours.aggregate(state, answers).state
    for key, tensor in merged.tensors.items():
        hand = state.tensors[key].double() + sum(
            sizes[answer.client] * answer.update.tensors[key].double() / 11 for answer in answers
        )
        torch.testing.assert_close(tensor.double(), hand, rtol=0, atol=1e-6)


def test_fedprox_adds_its_gradient(tiny: dict[str, str]) -> None:
    """After one plain SGD step the anchor has not moved yet; after two, mu * (w1 - w0) is in the step."""
    mu, rate = 0.7, 0.05
    results = {}
    for proximal in (0.0, mu):
        ours = make(
            tiny["bert"], "prefix", training={"optimizer": "sgd", "learning_rate": rate, "proximal": proximal}
        )
        examples = classification_examples(4)
        states = [ours.initialise().tensors]
        for steps in (1, 2):
            client = Client("here", ClientData("here", examples))
            task = TrainTask(states[0], round_number=1, work=Work(steps=steps))
            states.append(add(states[0], ours.execute(task, client).tensors))
        results[proximal] = states
    for name in results[mu][0]:
        start, first, second = (state[name] for state in results[mu])
        _, plain_first, plain_second = (state[name] for state in results[0.0])
        torch.testing.assert_close(first, plain_first)
        torch.testing.assert_close(second, plain_second - rate * mu * (first - start), rtol=1e-5, atol=1e-7)


def test_a_head_with_its_own_learning_rate(tiny: dict[str, str]) -> None:
    training = {"optimizer": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.3}
    ours = make(tiny["bert"], "prefix", training=training)
    plain = make(tiny["bert"], "prefix", training={"optimizer": "sgd", "learning_rate": 0.1})
    start = ours.initialise().tensors
    steps = {}
    for key, method in (("ours", ours), ("plain", plain)):
        client = Client("here", ClientData("here", classification_examples(4)))
        task = TrainTask(start, round_number=1, learning_rate_factor=0.5, work=Work(steps=1))
        steps[key] = method.execute(task, client).tensors
    for name in start:
        factor = 3.0 if name.startswith("classifier") else 1.0
        torch.testing.assert_close(steps["ours"][name], factor * steps["plain"][name], rtol=1e-4, atol=1e-6)
