"""Prefix memories: against the parallel adapters that they are equal to, computed with transformers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from fedcustom.core.errors import RecipeError
from fedcustom.data.examples import LearningTask
from fedcustom.methods import State
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import LABELS, MODELS, examples_for, make
from helpers.plain import logits, plain, plain_batch

ON_MODELS = pytest.mark.parametrize("model", list(MODELS))


def memory(tiny: dict[str, str], model: str, **settings: Any) -> Any:
    return make(tiny[model], "prefix", MODELS[model], kind="memory", length=4, **settings)


def filled(method: Any) -> dict[str, Tensor]:
    """Other values for all tensors but the head's."""
    generator = torch.Generator().manual_seed(5)
    start = method.initialise().tensors
    return {
        n: t if n in method.trainable.head else t + 3 * torch.randn(t.shape, generator=generator)
        for n, t in start.items()
    }


def exact(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits in float64, in which the order of sums does not matter."""
    return logits(model.double(), batch)


def rounds_alike(model: Any) -> bool:
    """Whether a model's activations of a number are the same wherever it stands in a tensor: on some
    processors GELU and SiLU are rounded in another way at a tensor's end, where numbers fill no whole vector.
    """
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    found = [m for m in model.modules() if "activation" in type(m).__module__]
    assert found
    return all(torch.equal(torch.cat([act(n) for n in numbers.split(1)]), act(numbers)) for act in found)


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_the_start_is_the_base_model_to_the_last_bit(tiny: dict[str, str], model: str, shifts: bool) -> None:
    kind = MODELS[model]
    batch = plain_batch(tiny[model], kind, model, examples_for(kind)[:4])
    task = LearningTask(kind, LABELS if kind == "classification" else ())  # type: ignore[arg-type]
    base = load_base(ModelSettings(base=tiny[model]), task, seed=0)
    expected = logits(base.model.eval(), batch)
    ours = logits(memory(tiny, model, query_shifts=shifts).trainable.model.eval(), batch)
    if rounds_alike(base.model):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(expected, logits(plain(tiny[model], kind, model), batch))


def parallel_adapters(base: Any, model: str, tensors: dict[str, Tensor]) -> None:
    """Put the attention slots into a plain model as parallel adapters on each block's input x::

        U act(D x + c)   D_h = K_h W_q,h / sqrt(d)   c_h = K_h b_q,h / sqrt(d)   U_h = W_o,h V_h^T

    added to the output matrix's output. Shifts of queries are those of the same units times S_h, added to the
    query matrix's output.
    """
    act = ACT2FN[{"bert": "gelu", "llama": "silu", "gpt2": "gelu_new", "bart": "gelu"}[model]]
    places = sorted(n.removesuffix(".slots.keys") for n in tensors if n.endswith(".slots.keys"))
    assert places
    for name in places:
        keys, values = tensors[f"{name}.slots.keys"], tensors[f"{name}.slots.values"]
        heads, slots, size = keys.shape
        query = base.get_submodule(name)
        around, last = name.rpartition(".")[0], {"bert": "output.dense", "llama": "o_proj"}
        at = around.removesuffix(".self") if model == "bert" else around
        output = base.get_submodule(f"{at}.{last.get(model, 'c_proj' if model == 'gpt2' else 'out_proj')}")
        turned = model == "gpt2"
        weight = (query.weight.T if turned else query.weight)[: heads * size].view(heads, size, -1)
        out = (output.weight.T if turned else output.weight).view(-1, heads, size)
        down = (keys @ weight / math.sqrt(size)).flatten(0, 1)
        bias = torch.zeros(heads * slots)
        if query.bias is not None:
            own = query.bias[: heads * size].view(heads, size)
            bias = torch.einsum("hsd,hd->hs", keys, own).flatten() / math.sqrt(size)
        up = torch.einsum("ohe,hse->ohs", out, values).flatten(1)
        if f"{name}.slots.shifts" in tensors:
            shifts = torch.block_diag(*tensors[f"{name}.slots.shifts"])  # (heads * slots, heads * size)

            def shifted(
                _: Any, inputs: Any, given: Tensor, down: Any = down, bias: Any = bias, shifts: Any = shifts
            ) -> Tensor:
                shift = act(inputs[0] @ down.T + bias) @ shifts
                return given + torch.nn.functional.pad(shift, (0, given.shape[-1] - shift.shape[-1]))

            query.register_forward_hook(shifted)
        kept: list[Tensor] = []
        query.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0]))
        output.register_forward_hook(
            lambda _, inputs, given, kept=kept, down=down, bias=bias, up=up: (
                given + act(kept.pop() @ down.T + bias) @ up.T
            )
        )


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_attention_slots_are_parallel_adapters(tiny: dict[str, str], model: str, shifts: bool) -> None:
    kind = MODELS[model]
    method = memory(tiny, model, feed_forward_slots=0, query_shifts=shifts)
    tensors = filled(method)
    method.trainable.write(tensors)
    batch = plain_batch(tiny[model], kind, model, examples_for(kind)[:4])
    base = plain(tiny[model], kind, model)
    untouched = exact(base, batch)
    parallel_adapters(base, model, {name: tensor.double() for name, tensor in tensors.items()})
    expected = exact(base, batch)
    assert (expected - untouched).abs().max() > 1e-3
    torch.testing.assert_close(exact(method.trainable.model.eval(), batch), expected, rtol=1e-6, atol=1e-6)


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_the_budget_is_that_of_key_value_pairs(tiny: dict[str, str], model: str, shifts: bool) -> None:
    """At most as many numbers as pairs of that length beside every attention block, and nearly as many."""
    method = memory(tiny, model, query_shifts=shifts)
    count = sum(t.numel() for n, t in method.initialise().tensors.items() if n not in method.trainable.head)
    heads = {"bert": 2 * 4, "llama": 2 * 2, "gpt2": 2 * 4, "bart": 6 * 4}[model]
    assert 0.5 * (budget := heads * 2 * 4 * 8) < count <= budget


@ON_MODELS
@pytest.mark.parametrize("shifts", [False, True])
def test_a_folder_loads_with_transformers_alone(
    tiny: dict[str, str], model: str, shifts: bool, tmp_path: Path
) -> None:
    import transformers as t

    kind = MODELS[model]
    method = memory(tiny, model, query_shifts=shifts)
    state = State(filled(method))
    method.export(state, tmp_path / "model")
    batch = plain_batch(tiny[model], kind, model, examples_for(kind)[:4])
    ours = exact(method.trainable.model.eval(), batch)
    loader = t.AutoModelForSequenceClassification if kind == "classification" else t.AutoModelForCausalLM
    loader = t.AutoModelForSeq2SeqLM if model == "bart" else loader
    with pytest.raises(ValueError, match="trust_remote_code"):
        loader.from_pretrained(tmp_path / "model", trust_remote_code=False)
    theirs = loader.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    torch.testing.assert_close(exact(theirs, batch), ours, rtol=1e-6, atol=1e-6)
    again = memory(tiny, model, query_shifts=shifts)
    again.trainable.write(again.ownership.complete(again.open(tmp_path / "model").tensors))
    torch.testing.assert_close(exact(again.trainable.model.eval(), batch), ours, rtol=1e-6, atol=1e-6)


@ON_MODELS
def test_feed_forward_slots_alone_are_a_plain_model(tiny: dict[str, str], model: str, tmp_path: Path) -> None:
    kind = MODELS[model]
    method = memory(tiny, model, slots=0, feed_forward_slots=3)
    method.export(State(filled(method)), tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.py"))
    batch = plain_batch(tiny[model], kind, model, examples_for(kind)[:4])
    ours = exact(method.trainable.model.eval(), batch)
    theirs = plain(tmp_path / "model", kind, model)
    torch.testing.assert_close(exact(theirs, batch), ours, rtol=1e-6, atol=1e-6)
    assert [p for p in theirs.state_dict() if "slots" in p] == []


@ON_MODELS
def test_frozen_keys_do_not_travel(tiny: dict[str, str], model: str) -> None:
    method = memory(tiny, model, keys="frozen", linear=True)
    names = set(method.initialise().tensors) - method.trainable.head
    writers = {"values", "linear"} | (set() if model == "bert" else {"shifts"})  # not by default in encoders
    assert {n.rpartition(".slots.")[2] for n in names if ".slots." in n} == writers
    assert not any("adapter.bias" in n for n in names)
    whole = memory(tiny, model, linear=True).initialise().tensors
    assert len(names) < len(whole)


@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_keys_of_a_text_are_those_that_its_tokens_have_alone(tiny: dict[str, str], model: str) -> None:
    """Read off the key matrices of the plain model, one token at a time."""
    text, kind = "the cat sees a dog", MODELS[model]
    method = memory(tiny, model, init="text", init_text=text, slots=6)
    tensors = method.initialise().tensors
    base = plain(tiny[model], kind, model).eval()
    tokens = method.base.tokenizer(text, add_special_tokens=False)["input_ids"]
    names = [n.removesuffix(".slots.keys") for n in tensors if n.endswith(".slots.keys")]
    assert len(names) == 2
    for name in names:
        heads, slots, size = tensors[f"{name}.slots.keys"].shape
        last = {"bert": ("query", "key"), "llama": ("q_proj", "k_proj"), "gpt2": ("", "")}[model]
        matrix = base.get_submodule(name.removesuffix(last[0]) + last[1])
        seen: list[Tensor] = []
        hook = matrix.register_forward_hook(lambda _, __, given, seen=seen: seen.append(given[0, 0]))
        with torch.no_grad():
            for token in tokens:
                base(input_ids=torch.tensor([[token]]))
        hook.remove()
        width = heads * size
        keys = torch.stack([given[width : 2 * width] if model == "gpt2" else given for given in seen])
        keys = keys.unflatten(1, (-1, size))
        keys = keys.repeat_interleave(heads // keys.shape[1], 1).transpose(0, 1)
        expected = torch.cat([keys] * slots, 1)[:, :slots]
        torch.testing.assert_close(tensors[f"{name}.slots.keys"], expected, rtol=1e-5, atol=1e-6)
        assert not tensors[f"{name}.slots.values"].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "zero"}, "keys of zero are never trained"),
        ({"init_text": "A text."}, "init_text: has no effect with init = 'auto'"),
        ({"init": "text", "slots": 0}, "has no effect with slots = 0"),
        ({"init": "text", "init_text": " \n"}, "init_text: is blank"),
        ({"kind": "kv", "init_text": " "}, "init_text: is blank"),
        ({"kind": "kv", "query_shifts": True}, "query_shifts = True: has no effect with kind = 'kv'"),
        ({"slots": 0, "query_shifts": True}, "query_shifts = true: has no effect with slots = 0"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"method": {"name": "prefix", "kind": "memory", **settings}})
