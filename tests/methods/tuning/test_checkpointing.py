"""Gradient checkpointing: the same gradients from fewer activations."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fedcustom.core.errors import ModelError
from fedcustom.methods.tuning.batching.client_modules import stand_ins
from fedcustom.methods.tuning.trial import trial_rows
from fedcustom.models import checkpointing as recomputing
from fedcustom.models.checkpointing import checkpointed_layers, checkpointing, keeping_all
from fedcustom.models.first_token import carry_classifying
from helpers.methods import MODELS, SETTINGS, SINGLE, make
from helpers.rounds import distance, rounds

TRAINING = {"batch_size": 3, "clip_norm": 1.0, "optimizer": "sgd", "learning_rate": 0.1}

NAMES = [
    "full", "adapter", "ia3", "bitfit", "ln_tuning", "prefix", "prefix reparametrised", "prefix memory",
    "prefix shifts", "prefix frozen", "soft_prompt", "soft_prompt lstm", "lora", "lora dora", "lora fedsb",
]  # fmt: skip
"""What passes through the model in a way of its own; other variants differ in what the server does."""

LONE = ("lora", "prefix")
"""Of those, what is tried for one client after the other too."""


def passes_of(model: Any) -> list[int]:
    """A growing list with an entry for each forward pass of each module in the last layer."""
    seen: list[int] = []
    for module in list(checkpointed_layers(model)[-1].modules())[1:]:
        module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize(
    ("name", "together"), [*((n, True) for n in NAMES), ("lora", False), ("prefix", False)]
)
def test_updates_are_those_of_kept_activations(
    tiny: dict[str, str], name: str, model: str, together: bool
) -> None:
    kind, technique, double = MODELS[model], name.split()[0], name not in SINGLE
    found, passes = [], []
    for switched in (False, True):
        training = {**TRAINING, "gradient_checkpointing": switched}
        method = make(tiny[model], technique, kind, **SETTINGS[name], training=training)
        seen = passes_of(method.trainable.model)
        found.append(rounds(method, kind, together=together, double=double))
        passes.append(len(seen))
    for before, after in zip(*found, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < (1e-9 if double else 1e-6), client
    assert passes[1] > passes[0]  # layers are passed again
    assert all("forward" not in layer.__dict__ for layer in checkpointed_layers(method.trainable.model))


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_dropout_is_drawn_again(tiny: dict[str, str], model: str) -> None:
    kind, found = MODELS[model], []
    for switched in (False, True):
        training = {**TRAINING, "gradient_checkpointing": switched, "dropout": True}
        method = make(tiny[model], "lora", kind, rank=4, dropout=0.3, training=training)
        found.append(rounds(method, kind, together=False, double=True))
    for before, after in zip(*found, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < 1e-9, client


@pytest.mark.parametrize("name", ["lora", "prefix", "prefix memory", "adapter", "soft_prompt", "ia3"])
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_backward_pass_in_another_thread_has_the_clients_tensors(
    tiny: dict[str, str], name: str, model: str
) -> None:
    """As on an accelerator, whose backward pass has a thread of its own."""
    kind = MODELS[model]
    method = make(tiny[model], name.split()[0], kind, **SETTINGS[name])
    trainable, objective = method.trainable, method.objective
    modules = stand_ins(trainable.model, trainable.parameters)
    assert modules is not None
    generator = torch.Generator().manual_seed(0)
    stacks = {
        n: (p.detach() + 0.1 * torch.randn(2, *p.shape, generator=generator)).requires_grad_()
        for n, p in trainable.parameters.items()
    }
    batch = objective.collate(trial_rows(objective, method.base))
    owners = torch.tensor([0, 1, 1])

    def gradients(carried: list[Any] | None) -> list[torch.Tensor]:
        made: list[torch.Tensor] = []
        modules.give(stacks, owners)
        with modules.in_place(), checkpointing(trainable.model, carried or []):
            if carried is None:
                with keeping_all():
                    loss = objective.row_losses(trainable.model, batch).sum()
            else:
                loss = objective.row_losses(trainable.model, batch).sum()

            def backward() -> None:
                made.extend(torch.autograd.grad(loss, list(stacks.values()), allow_unused=True))

            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        return made

    wanted, found = gradients(None), gradients([carry_classifying, modules.carry])
    for one, other in zip(wanted, found, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_fewer_bytes_are_kept(tiny: dict[str, str]) -> None:
    """What a pass keeps for its backward pass, by the live tensors that it made."""
    method = make(tiny["llama"], "lora", "generation", rank=4)
    batch = method.objective.collate(trial_rows(method.objective, method.base) * 4)
    kept = []
    for context in (keeping_all(), checkpointing(method.trainable.model)):
        with context, torch.profiler.profile(profile_memory=True) as profile:
            loss = method.objective.loss(method.trainable.model, batch)
        # Bytes allocated less those freed again by the end of the forward pass.
        kept.append(sum(event.self_cpu_memory_usage for event in profile.key_averages()))
        del loss
    assert kept[1] < 0.7 * kept[0]


def test_a_model_without_such_layers_is_refused(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcustom.methods.tuning.checkpoint_check.checkpointed_layers", lambda model: [])
    with pytest.raises(ModelError, match=r"gradient_checkpointing = true does not fit .* leave it off$"):
        make(tiny["bert"], "lora", training={"gradient_checkpointing": True})


def test_layers_that_give_something_else_the_second_time_are_refused(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = recomputing._forward, [0]

    def drifting(inner: Any, *arguments: Any, **named: Any) -> Any:
        def layer(states: torch.Tensor, *more: Any, **others: Any) -> Any:
            calls[0] += 1
            result = inner(states, *more, **others)
            first = result[0] if isinstance(result, tuple) else result
            return first * (1 + 0.2 * (calls[0] % 3))

        return forward(layer, *arguments, **named)

    monkeypatch.setattr(recomputing, "_forward", drifting)
    with pytest.raises(ModelError, match="gradients differ by"):
        make(tiny["llama"], "lora", "generation", training={"gradient_checkpointing": True})
