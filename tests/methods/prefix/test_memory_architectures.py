"""Prefix memories on architectures of many kinds, and in passes of many kinds."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripts.architectures.models import kind_of, write_model
from torch import Tensor
from transformers.activations import ACT2FN

from fedcustom.core.errors import ModelError
from fedcustom.methods import WeightTuning
from fedcustom.methods.prefix.attention_slots import Passing
from fedcustom.models.first_token import classifying
from helpers.methods import make
from helpers.plain import watched

Models = Callable[[str], str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The folder of an architecture's tiny model, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        if not (folder / name).exists():
            write_model(name, folder / name)
        return str(folder / name)

    return path


def memory(path: str, name: str, **settings: Any) -> WeightTuning:
    """A method whose slots add something."""
    kind = "classification" if kind_of(name) == "encoder" else "generation"
    method = make(path, "prefix", kind, kind="memory", length=4, **settings)
    generator = torch.Generator().manual_seed(5)
    method.trainable.write(
        {
            n: t if n in method.trainable.head else t + 0.5 * torch.randn(t.shape, generator=generator)
            for n, t in method.initialise().tensors.items()
        }
    )
    return method


def inputs(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Texts of unlike lengths."""
    ids = torch.randint(4, 300, (rows, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[rows // 2, 4:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return {**found, "decoder_input_ids": ids[:, :5]} if kind_of(name) == "encoder-decoder" else found


def states(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The last states of a model's body."""
    body = getattr(model, model.base_model_prefix, model)
    if not hasattr(body, "get_input_embeddings"):
        body = model
    wants = {"output_hidden_states": True} if body is model else {}
    found = body(**given, **wants)
    result: Tensor = (
        found.last_hidden_state if "last_hidden_state" in found else found.decoder_hidden_states[-1]
    )
    return result


Rows = Callable[[Tensor, int, int], Tensor]


def first(weight: Tensor, heads: int, size: int) -> Tensor:
    return weight[: heads * size].unflatten(0, (heads, size))


def interleaved(weight: Tensor, heads: int, size: int) -> Tensor:
    return weight.unflatten(0, (heads, 3, size))[:, 0]


LAYOUTS: dict[str, tuple[str, str, Rows]] = {
    "gpt_neox": ("dense", "gelu", interleaved),
    "phi3": ("o_proj", "silu", first),
    "qwen3": ("o_proj", "silu", first),
    "gemma2": ("o_proj", "gelu_pytorch_tanh", first),
    "t5": ("o", "relu", first),
    "albert": ("dense", "gelu_new", first),
    "roberta": ("output.dense", "gelu", first),
    "modernbert": ("Wo", "gelu", first),
}
"""The output matrix beside the queries' (or beside the module that holds it), the activation, and where the
heads' queries stand in the rows of a fused matrix.
"""


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_attention_slots_are_parallel_adapters(models: Models, name: str) -> None:
    """Each adds U act(D x + c), D_h = K_h W_q,h / sqrt(d), c_h = K_h b_q,h / sqrt(d), U_h = W_o,h V_h^T, to
    the output of the block with input x, in a model that transformers loads. Shifts of queries are added to
    the rows of the queries in the query matrix's output.
    """
    import transformers

    method = memory(models(name), name, feed_forward_slots=0)
    ours = method.trainable.model.eval()
    base = transformers.AutoModel.from_pretrained(models(name)).eval()
    named, tensors = dict(base.named_modules()), method.trainable.read()
    output, activation, rows = LAYOUTS[name]
    act, places = ACT2FN[activation], [n for n in tensors if n.endswith(".slots.keys")]
    assert places
    with torch.no_grad():
        before = states(base, inputs(name))
        for place in places:
            keys, values = tensors[place], tensors[place.replace("keys", "values")]
            heads, slots, size = keys.shape
            query_name = place.removesuffix(".slots.keys")
            while query_name not in named:
                query_name = query_name.partition(".")[2]
            query, around = named[query_name], query_name.rpartition(".")[0]
            after = named[f"{around.removesuffix('.self')}.{output}"]
            down = (keys @ rows(query.weight, heads, size) / math.sqrt(size)).flatten(0, 1)
            bias = torch.zeros(heads * slots)
            if query.bias is not None:
                bias = (keys @ rows(query.bias, heads, size).unsqueeze(-1)).flatten() / math.sqrt(size)
            up = torch.einsum("ohe,hse->ohs", after.weight.unflatten(1, (heads, -1)), values).flatten(1)
            if (shifts := place.replace("keys", "shifts")) in tensors:
                at = rows(torch.arange(len(query.weight)), heads, size).flatten()
                writes = torch.block_diag(*tensors[shifts])  # (heads * slots, heads * size)
                query.register_forward_hook(
                    lambda _, entered, given, down=down, bias=bias, writes=writes, at=at: given.index_add(
                        2, at, act(entered[0] @ down.T + bias) @ writes
                    )
                )
            kept: list[Tensor] = []
            query.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
            after.register_forward_hook(
                lambda _, __, given, kept=kept, down=down, bias=bias, up=up: (
                    given + act(kept.pop() @ down.T + bias) @ up.T
                )
            )
        expected = states(base, inputs(name))
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(states(ours, inputs(name)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt_neox"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_with_checkpoints_are_those_without(models: Models, name: str, reentrant: bool) -> None:
    method = memory(models(name), name)
    model, given = method.trainable.model, inputs(name)
    model.train()
    for module in model.modules():
        for key in ("p", "dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**given).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in method.trainable.parameters.items() if p.grad is not None}

    expected = gradients()
    assert any(n.endswith("slots.keys") for n in expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    found = gradients()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    assert not left_over(model)


def left_over(model: Any) -> list[Tensor]:
    """What passes between a block's matrices outside of a pass."""
    hooks = [h for m in model.modules() for h in m._forward_hooks.values()]
    held = [a for hook in hooks for a in getattr(hook, "args", ()) if isinstance(a, Passing)]
    assert held
    return [passing.added for passing in held if passing.added is not None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "bart", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shifts", [False, True])
def test_generation_with_a_cache_is_that_without(models: Models, name: str, beams: int, shifts: bool) -> None:
    model = memory(models(name), name, query_shifts=shifts).trainable.model.eval()
    given = inputs(name)
    given.pop("decoder_input_ids", None)
    given["attention_mask"] = given["attention_mask"].flip(1)  # padded on the left
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": beams, "do_sample": False}
    with torch.no_grad():
        found = model.generate(**given, **options, use_cache=True)
        expected = model.generate(**given, **options, use_cache=False)
    assert torch.equal(found, expected)
    assert shifts or len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet"])
def test_a_last_layer_for_the_first_token_alone_gives_the_same(models: Models, name: str) -> None:
    """As every encoder's that is classified by its first token is computed in training."""
    model = memory(models(name), name).trainable.model.eval()
    after = {"distilbert": "sa_layer_norm", "mpnet": "attention.LayerNorm"}.get(
        name, "attention.output.dense"
    )
    (last,) = [n for n, _ in model.named_modules() if n.endswith(f"layer.1.{after}")]
    with torch.no_grad():
        whole = model(**inputs(name)).logits
        seen = watched(model, last)
        with classifying():
            found = model(**inputs(name)).logits
    assert seen == [1]
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_error_within_a_block_leaves_nothing_behind(models: Models, name: str) -> None:
    model = memory(models(name), name).trainable.model.eval()
    given = inputs(name)
    expected = states(model, given)
    value = next(m for n, m in model.named_modules() if n.endswith(("v_proj", ".value")))

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = value.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        states(model, given)
    hook.remove()
    assert not left_over(model)
    assert torch.equal(states(model, given), expected)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_copies_and_threads_have_passes_of_their_own(models: Models, name: str) -> None:
    model = memory(models(name), name).trainable.model.eval()
    other = copy.deepcopy(model)
    given = [inputs(name, rows) for rows in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [states(model, each) for each in given]
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(states(other, given[0]), expected[0])
        assert torch.equal(states(model, given[0]), expected[0])
    wrong: list[int] = []

    @torch.no_grad()
    def work(number: int) -> None:
        found = [states(model, given[number]) for _ in range(10)]
        wrong.extend(number for each in found if not torch.allclose(each, expected[number], atol=1e-6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_bfloat16_is_float32_to_its_rounding(models: Models, name: str) -> None:
    model = memory(models(name), name).trainable.model.eval()
    given = inputs(name)
    with torch.no_grad():
        expected = states(model, given)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = states(model, given).float()
        whole = states(model.to(torch.bfloat16), given).float()
    for found in (mixed, whole):
        assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["longformer", "xlnet", "fnet", "jetmoe"])
def test_models_whose_matrices_do_not_fit_are_refused(models: Models, name: str) -> None:
    with pytest.raises(ModelError, match=r"'memory' does not fit .*method\.slots = 0") as raised:
        memory(models(name), name)
    assert "\n" not in str(raised.value)


def test_feed_forward_slots_alone_need_no_attention(models: Models) -> None:
    method = memory(models("xlnet"), "xlnet", slots=0, feed_forward_slots=2)
    assert {n.rpartition(".")[2] for n in method.initialise().tensors} == {"weight", "bias"}
    with pytest.raises(ModelError, match="no slots are left"):
        memory(models("flaubert"), "flaubert", slots=0)


@pytest.mark.parametrize("name", ["led", "bigbird_pegasus", "pegasus_x", "prophetnet"])
def test_blocks_without_slots_are_said(models: Models, name: str) -> None:
    (said,) = [text for text in memory(models(name), name).remarks() if "beside" in text]
    assert "slots stand beside 4 of its 6 attention blocks" in said
