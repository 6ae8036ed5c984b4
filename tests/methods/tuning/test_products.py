"""Products in bfloat16 on a processor: the same numbers in few shapes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedcustom.methods.tuning.batching.client_products import SMALL, client_products, grouped_products
from fedcustom.models.products import FewShapesLinear, padded_rows, product, use_few_shapes

BFLOAT16 = torch.bfloat16


class Rows(TorchDispatchMode):
    """The numbers of rows of all matrix products in bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm") and result.dtype == BFLOAT16:
            self.seen.add(len(result))
        return result


def gradients(made: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    """Those of a sum with fixed factors."""
    factors = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype)
    return torch.autograd.grad(made, given, factors)


@given(st.integers(1, 100_000))
def test_few_rows_more(rows: int) -> None:
    padded = padded_rows(rows)
    assert padded % 8 == 0
    assert rows <= padded <= max(rows + 8, rows * 9 / 8 + 1)
    assert padded_rows(padded) == padded


def test_eight_shapes_between_powers_of_two() -> None:
    assert len({padded_rows(rows) for rows in range(257, 513)}) == 8
    assert len({padded_rows(rows) for rows in range(1, 4097)}) < 60


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kind", [torch.float32, BFLOAT16], ids=str)
def test_the_numbers_of_linear(kind: torch.dtype, biased: bool, trained: bool) -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 9, 48).to(kind)[..., 8:40].requires_grad_()  # not contiguous
    weight = torch.randn(24, 32).to(torch.float32 if trained else kind).requires_grad_(trained)
    bias = torch.randn(24).requires_grad_(trained) if biased else None
    wanted = [tensor for tensor in (states, weight, bias) if tensor is not None and tensor.requires_grad]
    with torch.autocast("cpu", BFLOAT16):
        made, plain = product(states, weight, bias), functional.linear(states, weight, bias)
    assert made.dtype == plain.dtype == BFLOAT16
    assert made.shape == plain.shape
    torch.testing.assert_close(made, plain, rtol=1e-2, atol=2e-2)
    for mine, theirs in zip(gradients(made, *wanted), gradients(plain, *wanted), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=5e-2)


def test_float32_is_left_as_it_is() -> None:
    states, weight = torch.randn(5, 9, 32), torch.randn(24, 32)
    assert torch.equal(product(states, weight), functional.linear(states, weight))


def test_layers_of_a_model_make_few_shapes() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(BFLOAT16)
    model.requires_grad_(False)
    before = copy.deepcopy(model)
    use_few_shapes(model)
    assert all(isinstance(layer, FewShapesLinear) for layer in (model[0], model[2]))
    assert model.state_dict().keys() == before.state_dict().keys()
    few, many = Rows(), Rows()
    for rows in range(130, 250):
        states = torch.randn(rows, 16, requires_grad=True)
        with torch.autocast("cpu", BFLOAT16), few:
            model(states).sum().backward()
        with torch.autocast("cpu", BFLOAT16), many:
            before(states).sum().backward()
    assert len(few.seen) <= 9
    assert len(many.seen) >= 120


@pytest.mark.parametrize("counts", [[3, 1, 4], [2, 2, 2], [1]], ids=str)
@pytest.mark.parametrize("out", [4, 300_000 // 16], ids=["small", "large"])
def test_products_of_clients(counts: list[int], out: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(sum(counts), 7, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), out, 16, dtype=torch.float64, requires_grad=True)
    large = 2 * states.numel() * out / len(counts) > SMALL
    assert large == (out > 4)
    made = client_products(states, weight, counts)
    parts = zip(states.split(counts), weight.unbind(), strict=True)
    by_hand = torch.cat([torch.einsum("rti,oi->rto", rows, own) for rows, own in parts])
    torch.testing.assert_close(made, by_hand, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(made, states, weight), gradients(by_hand, states, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("counts", [[3, 1, 4], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, BFLOAT16], ids=str)
def test_products_of_clients_in_bfloat16(kind: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    states = torch.randn(sum(counts), 7, 16).to(kind).requires_grad_()
    weight = torch.randn(len(counts), 4, 16, requires_grad=True)
    rows = Rows()
    with torch.autocast("cpu", BFLOAT16), rows:
        made = client_products(states, weight, counts)
    assert made.dtype == BFLOAT16
    assert not rows.seen  # none that would be compiled
    parts = zip(states.float().split(counts), weight.unbind(), strict=True)
    exact = torch.cat([functional.linear(rows, own) for rows, own in parts])
    torch.testing.assert_close(made.float(), exact, rtol=1e-2, atol=1e-2)
    mine, theirs = gradients(made, states, weight), gradients(exact, states, weight)
    assert [tensor.dtype for tensor in mine] == [kind, torch.float32]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=3e-2, atol=6e-2)


def test_products_of_clients_in_one_kernel() -> None:
    """On a processor torch computes by a loop what is one kernel on a GPU."""
    torch.manual_seed(0)
    counts = [3, 1, 4]
    states = torch.randn(sum(counts), 7, 16, requires_grad=True)
    weight = torch.randn(len(counts), 8, 16, requires_grad=True)
    made = grouped_products(states, weight, counts)
    parts = zip(states.split(counts), weight.unbind(), strict=True)
    exact = torch.cat([functional.linear(rows, own) for rows, own in parts])
    torch.testing.assert_close(made.float(), exact, rtol=2e-2, atol=5e-2)
    made_sum, exact_sum = made.float().sum(), exact.sum()  # a gradient without a layout of its own
    for one, other in zip(
        torch.autograd.grad(made_sum, (states, weight)),
        torch.autograd.grad(exact_sum, (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), other, rtol=3e-2, atol=1e-1)
