"""Every method and variant on every kind of model: two rounds, what changed, what came up, what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcustom.data.examples import ClientData
from fedcustom.methods import Answer, Client, WeightTuning
from test_methods import examples_for, make
from test_techniques import MODELS, logits, plain, plain_batch

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"width": 6},
    "ia3": {},
    "bitfit": {"norms": True},
    "prefix": {"length": 4},
    "prefix matched": {"length": 4, "merging": "matched"},
    "prefix stacked": {"length": 4, "merging": "stacked"},
    "prefix reparametrised": {"length": 4, "reparametrise": True},
    "soft_prompt": {"length": 4},
    "soft_prompt p-tuning": {"length": 4, "encoder": "mlp"},
    "soft_prompt lstm": {"length": 4, "encoder": "lstm"},
    "lora": {"rank": 4},
    "lora rslora": {"rank": 4, "rank_stabilised": True},
    "lora private": {"rank": 3, "private_rank": 2},
    "lora dora": {"rank": 4, "dora": True},
    **{
        f"lora {variant}": {"rank": 4, "variant": variant}
        for variant in ("ffa", "flora", "fedex", "rolora", "fedsa", "flexlora", "hetlora", "fedsb")
    },
}
CHANGES_BASE = ("lora flora", "lora fedex")
KEEPS = {"lora fedsa": "lora_B", "lora private": "_private"}


def two_rounds(method: WeightTuning, kind: str) -> tuple[Any, set[str]]:
    """The state after two rounds of two clients, and the names of what came up."""
    examples = examples_for(kind)
    parts = {"a": examples[:4], "b": examples[4:10]}
    clients = {name: Client(name, ClientData(name, part)) for name, part in parts.items()}
    state, came = method.initialise(), set()
    for number in (1, 2):
        answers = []
        for name, client in clients.items():
            task = method.configure(state, number, {name: {"epochs": 1}})[name]
            update = method.execute(task, client)
            method.check(task, update)
            came |= update.tensors.keys()
            answers.append(Answer(name, task, update))
        state = method.aggregate(state, answers)
    return state, came


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_method_on_every_model(tiny: dict[str, str], tmp_path: Path, name: str, model: str) -> None:
    kind, technique = MODELS[model], name.split()[0]
    method = make(tiny[model], technique, kind, **SETTINGS[name])
    parameters = {id(p): n for n, p in method.trainable.parameters.items()}
    before = {
        n: p.detach().clone() for n, p in method.trainable.model.named_parameters() if id(p) not in parameters
    }
    start = method.initialise().tensors
    state, came = two_rounds(method, kind)

    kept = {n for n in start if KEEPS.get(name, "-") in n}
    declared = {n for n in start if not n.startswith("base_change/")} - kept
    if name == "lora flora":  # whose state is the base; the factors begin anew in each round
        assert came - declared == {n for n in method.trainable.read() if ".lora_" in n}
    else:
        assert came == declared
    assert any(not torch.equal(state.tensors[n], t) for n, t in start.items())
    assert all(torch.equal(state.tensors[n], start[n]) for n in kept)
    for key, parameter in method.trainable.model.named_parameters():
        # Where a network trains the virtual tokens, these are written by it.
        written = "prompt_encoder" in key or (name in CHANGES_BASE and key.endswith("base_layer.weight"))
        if key in before and not written:
            assert torch.equal(parameter, before[key]), key

    method.export(state, tmp_path / "model")
    examples = examples_for(kind)[:3]
    batch = plain_batch(tiny[model], kind, model, examples)
    ours = logits(method.trainable.model.eval(), batch)
    if (tmp_path / "model" / "adapter_config.json").exists():
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(plain(tiny[model], kind, model), str(tmp_path / "model")).eval()
    else:
        theirs = plain(tmp_path / "model", kind, model)
    torch.testing.assert_close(logits(theirs, batch), ours, rtol=1e-4, atol=1e-5)

    again = make(tiny[model], technique, kind, **SETTINGS[name])
    opened = again.open(tmp_path / "model")
    again.trainable.write(again.ownership.complete(opened.tensors))
    torch.testing.assert_close(logits(again.trainable.model.eval(), batch), ours, rtol=1e-4, atol=1e-5)
