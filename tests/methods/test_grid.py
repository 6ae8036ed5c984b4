"""Every method and variant on every kind of model: two rounds, what changed, what came up, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.methods import MODELS, SETTINGS, examples_for, make
from helpers.plain import logits, plain, plain_batch
from helpers.rounds import two_rounds

CHANGES_BASE = ("lora flora", "lora fedex")
KEEPS = {"lora fedsa": "lora_B", "lora private": "_private"}


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
    if name == "lora fedask":  # of whose products of factors sketches come up
        matrices = {n.partition(".lora_")[0] for n in declared if ".lora_" in n}
        declared = {n for n in declared if ".lora_" not in n} | {f"sketch/{n}" for n in matrices}
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
