"""Quantisation schemes against their formulas, and quantised layers against plain ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcustom.core.errors import ModelError
from fedcustom.data.examples import LearningTask
from fedcustom.methods.tuning.batching.trainer import saved_bytes
from fedcustom.models.load import load_base
from fedcustom.models.memory_mapping import park
from fedcustom.models.quantisation import GROUP, scheme
from fedcustom.models.quantisation import SCHEMES as KNOWN
from fedcustom.models.quantised_layers import (
    QuantisedLinear,
    count_weights,
    exact_weights,
    quantised_layers,
    stored_bytes,
)
from fedcustom.models.settings import ModelSettings
from helpers.quantised import SCHEMES, needs, wide_model

CPU = torch.device("cpu")
GENERATION = LearningTask("generation")


def weight(rows: int = 6, columns: int = 4 * GROUP) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.02


def unpacked(name: str, given: torch.Tensor) -> np.ndarray:
    chosen = scheme(name, CPU)  # type: ignore[arg-type]
    return chosen.unpack(chosen.pack(given), given.shape, torch.float32).numpy()


@pytest.mark.parametrize("name", [needs("int8")])
def test_int8_has_one_scale_a_row(name: str) -> None:
    given = weight()
    matrix = given.double().numpy()
    scales = np.abs(matrix).max(axis=1, keepdims=True) / 127.5
    expected = np.clip(np.rint(matrix / scales), -128, 127) * scales
    assert np.abs(unpacked(name, given) - expected).max() < 1e-7


@pytest.mark.parametrize("name", [needs("int4")])
def test_int4_has_a_scale_and_a_zero_a_group(name: str) -> None:
    given = weight()
    groups = given.double().numpy().reshape(len(given), -1, GROUP)
    low, high = (np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0))
    scales = (high - low) / 15
    zeros = np.clip(np.rint(-low / scales), 0, 15)[..., None]
    scales = torch.tensor(scales).bfloat16().double().numpy()[..., None]
    expected = (np.clip(np.rint(groups / scales) + zeros, 0, 15) - zeros) * scales
    found = unpacked(name, given).reshape(groups.shape)
    # A number halfway between two levels may go to either.
    assert (np.abs(found - expected) < 1e-7).mean() > 0.999
    assert (np.abs(found - groups) <= 0.52 * scales + (zeros == 0) * scales + (zeros == 15) * scales).all()


@pytest.mark.parametrize("name", [needs("nf4")])
def test_nf4_takes_the_nearest_quantile(name: str) -> None:
    """The levels are those of QLoRA (Dettmers et al. 2023, appendix E)."""
    levels = np.array(
        [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803,
         0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    )  # fmt: skip
    given = weight()
    groups = given.double().numpy().reshape(len(given), -1, GROUP)
    scales = np.abs(groups).max(-1, keepdims=True)
    nearest = levels[np.abs(groups[..., None] / scales[..., None] - levels).argmin(-1)]
    found = unpacked(name, given).reshape(groups.shape)
    # The scales are stored in 8 bits, to about one part in a hundred.
    assert np.abs(found - nearest * scales).max() < 0.02 * scales.max()


@pytest.mark.parametrize(("name", "bits"), [(*needs(n).values, b) for n, b in (("int8", 8), ("int4", 4.375))])
def test_bits_of_a_number(name: str, bits: float) -> None:
    if importlib.util.find_spec(KNOWN[name].package) is None:  # type: ignore[index]
        pytest.skip("not installed")
    given = weight(64, 64 * GROUP)
    tensors = KNOWN[name].pack(given)  # type: ignore[index]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert 8 * size / given.numel() == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_gives_what_a_plain_one_with_its_weight_gives(name: str, autocast: bool) -> None:
    plain = nn.Linear(4 * GROUP, 6)
    layer = QuantisedLinear(plain, scheme(name, CPU))  # type: ignore[arg-type]
    copy = nn.Linear(4 * GROUP, 6)
    copy.weight.data, copy.bias.data = layer.weight.clone(), plain.bias.data.clone()
    found = []
    for module in (layer, copy):
        states = torch.randn(2, 5, 4 * GROUP, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = module(states)
        assert result.dtype == (torch.bfloat16 if autocast else torch.float32)
        (gradient,) = torch.autograd.grad(result.float().square().sum(), states)
        found.append((result, gradient))
    tolerance = 0.02 if autocast else 1e-5
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max())
        )


@pytest.mark.parametrize("name", SCHEMES)
def test_a_pass_keeps_no_unpacked_copy(name: str) -> None:
    layer = QuantisedLinear(nn.Linear(64 * GROUP, 8), scheme(name, CPU))  # type: ignore[arg-type]
    states = torch.randn(1, 64 * GROUP, requires_grad=True)
    with saved_bytes() as saved:
        layer(states * 2)
    assert sum(saved.values()) < 8 * 64 * GROUP  # a copy has two bytes or four for each of its numbers


@pytest.mark.parametrize("name", SCHEMES)
def test_another_dtype_leaves_what_is_stored(name: str) -> None:
    layer = QuantisedLinear(nn.Linear(GROUP, 6), scheme(name, CPU))  # type: ignore[arg-type]
    before = {key: tensor.clone() for key, tensor in layer.tensors().items()}
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    for key, tensor in layer.tensors().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_body_is_quantised_and_nothing_else(tmp_path: Path, kind: str, name: str) -> None:
    folder = wide_model(tmp_path / kind, kind)
    task = LearningTask("classification", ("a", "b")) if kind == "bert" else GENERATION
    exact = load_base(ModelSettings(base=folder), task, seed=0)
    base = load_base(ModelSettings(base=folder, quantization=name), task, seed=0)  # type: ignore[arg-type]
    layers = quantised_layers(base.model)
    names = {layer.place for layer in layers}
    assert all(".layer" in place or place == "bert.pooler.dense" for place in names)
    # A pooling layer is a matrix of the body; down_proj has rows of 96 numbers.
    expected = 2 * 6 + 1 if kind == "bert" else 2 * 7
    fitting = expected if kind == "bert" or name == "int8" else expected - 2
    assert base.quantised is not None
    assert (base.quantised.matrices, base.quantised.of) == (len(layers), expected)
    assert len(layers) == fitting
    assert f"{fitting} of {expected} matrices in {name}" in base.quantised.in_words()
    for place, module in exact.model.named_modules():
        own = base.model.get_submodule(place)
        if not isinstance(own, QuantisedLinear):
            for key, parameter in module.named_parameters(recurse=False):
                assert torch.equal(parameter, dict(own.named_parameters(recurse=False))[key])
    assert count_weights(base.model) == count_weights(exact.model)
    saved = stored_bytes(exact.model) - stored_bytes(base.model)
    assert saved == base.quantised.before - base.quantised.after > 0


@pytest.mark.parametrize("name", [needs("int8")])
def test_exact_weights_come_back(tmp_path: Path, name: str) -> None:
    folder = wide_model(tmp_path / "llama", "llama")
    exact = load_base(ModelSettings(base=folder), GENERATION, seed=0).model
    base = load_base(ModelSettings(base=folder, quantization=name), GENERATION, seed=0)  # type: ignore[arg-type]
    model, ids = base.model, torch.arange(3, 12)[None]
    with torch.no_grad():
        before, wanted = model(input_ids=ids).logits, exact(input_ids=ids).logits
        with exact_weights(model, base.quantised):
            assert torch.equal(model(input_ids=ids).logits, wanted)
            assert model.state_dict().keys() == exact.state_dict().keys()
        assert torch.equal(model(input_ids=ids).logits, before)
    gap = float((before - wanted).norm() / wanted.norm())
    assert 1e-4 < gap < 0.05  # half a percent of each weight


@pytest.mark.parametrize("name", [needs("int8")])
def test_a_parked_model_gives_the_same(tmp_path: Path, name: str) -> None:
    folder = wide_model(tmp_path / "llama", "llama")
    model = load_base(ModelSettings(base=folder, quantization=name), GENERATION, seed=0).model  # type: ignore[arg-type]
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        park(model, tmp_path / "parked")
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", [needs("int8")])
def test_a_model_without_linear_layers_is_refused(tiny: dict[str, str], name: str) -> None:
    settings = ModelSettings(base=tiny["gpt2"], quantization=name)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"none of its 8 matrices .*\(Conv1D\); leave it out$"):
        load_base(settings, GENERATION, seed=0)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_missing_package_is_named(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = importlib.util.find_spec

    def lacking(package: str, *more: Any) -> Any:
        return None if package in ("torchao", "bitsandbytes") else found(package, *more)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    settings = ModelSettings(base=tiny["llama"], quantization=name)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"needs the package \w+: pip install 'fedcustom\[quantization\]'$"):
        load_base(settings, GENERATION, seed=0)


def test_another_accelerator_is_refused() -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    with pytest.raises(ModelError, match="runs on cpu and cuda; this run trains on mps"):
        scheme("int8", torch.device("mps"))
