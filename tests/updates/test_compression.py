"""Compression of changes: bytes, error bounds, error feedback, and the refusal of malformed messages."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from fedcustom.core.errors import WireError
from fedcustom.transport import wire
from fedcustom.updates.compression import (
    NF4,
    compress,
    compress_with_feedback,
    decompress,
    pack_varints,
    unpack_varints,
)
from fedcustom.updates.settings import CompressionSettings

KINDS = ("none", "float16", "bfloat16", "int8", "int4", "top_k")
LOSSY = KINDS[1:]


def asked(kind: str, **fields: Any) -> CompressionSettings:
    return CompressionSettings.model_validate({"kind": kind, **fields})


def there_and_back(change: dict[str, Tensor], chosen: CompressionSettings) -> dict[str, Tensor]:
    """Through the bytes of a real message."""
    packed, _ = wire.decode(wire.encode(compress(change, chosen), {}))
    return decompress(packed, change, chosen)


def normal(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    """The stream: tensors end to end in the order of their names."""
    parts = [tensors[name].float().flatten().numpy() for name in sorted(tensors)]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest number with eight significant bits, ties to even, on the bits."""
    bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return (bits & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32)


def in_blocks(stream: np.ndarray, block: int) -> np.ndarray:
    return np.pad(stream, (0, -len(stream) % block)).reshape(-1, block)


def scales_of(stream: np.ndarray, block: int, levels: int) -> np.ndarray:
    largest = np.abs(in_blocks(stream, block)).max(1) / np.float32(levels)
    return to_bfloat16(np.clip(largest, np.float32(2.0**-126), np.float32(torch.finfo(torch.bfloat16).max)))


# Bytes


def minilm_message() -> dict[str, Tensor]:
    """A prefix of 16 for MiniLM-L6 (12 x 16 x 384 = 73,728 numbers) and a head of six classes (2,310)."""
    names = [f"layers.{layer}.{part}" for layer in range(6) for part in ("key", "value")]
    prefix = {name: normal(16 * 384, seed).view(16, 384) for seed, name in enumerate(names)}
    return {**prefix, "head.weight": normal(6 * 384, 90).view(6, 384), "head.bias": normal(6, 91)}


@pytest.mark.parametrize(
    ("kind", "numbers_bytes", "largest_share"),
    [
        ("float16", 2 * 76_038 + 2, 0.51),
        ("bfloat16", 2 * 76_038, 0.51),
        ("int8", 76_038 + 2 * 595, 0.266),  # 595 blocks of 128
        ("int4", 38_019 + 2 * 1_189, 0.141),  # 1,189 blocks of 64
    ],
)
def test_bytes_on_the_wire(kind: str, numbers_bytes: int, largest_share: float) -> None:
    message = minilm_message()
    one = {"all": torch.from_numpy(flat(message))}  # fewer names in the header: the harder comparison
    assert one["all"].numel() == 73_728 + 2_310
    packed = compress(message, asked(kind))
    assert sum(tensor.nbytes for tensor in packed.values()) == numbers_bytes
    assert len(wire.encode(packed, {})) == wire.length(packed, {})
    assert wire.length(packed, {}) <= largest_share * wire.length(one, {})
    assert wire.length(packed, {}) < largest_share * wire.length(message, {})
    assert wire.length(packed, {}) - numbers_bytes < 200
    assert len(wire.encode(compress(one, asked(kind)), {})) == wire.length(packed, {})


def test_bytes_of_top_k() -> None:
    stream = normal(100_000)
    packed = compress({"w": stream}, asked("top_k", fraction=0.05))
    assert packed["numbers"].shape == (5_000,)
    gaps = np.diff(np.sort(np.argsort(-np.abs(stream.numpy()), kind="stable")[:5_000]), prepend=-1) - 1
    assert packed["gaps"].numel() == np.sum(gaps < 128) + 2 * np.sum(gaps >= 128)
    assert packed["gaps"].numel() < 5_100


# Against an independent implementation

float_dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
shapes = st.lists(st.integers(0, 5), max_size=3)
magnitudes = st.sampled_from([0.0, 1e-45, 1e-39, 1e-30, 1e-8, 1e-4, 1.0, 6e4, 7e4, 1e20, 3.4e38])


@st.composite
def changes(draw: Any) -> dict[str, Tensor]:
    """Up to four tensors of any dtype and shape, each number of any magnitude, the largest included."""
    result = {}
    for name in draw(st.lists(st.sampled_from("badc"), unique=True, max_size=4)):
        dtype, shape = draw(st.tuples(float_dtypes, shapes))
        size = math.prod(shape)
        spread = draw(st.lists(magnitudes, min_size=size, max_size=size))
        seed = draw(st.integers(0, 2**16))
        unit = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
        numbers = unit * torch.tensor(spread, dtype=torch.float64)
        limit = torch.finfo(dtype).max
        result[name] = numbers.clamp(-limit, limit).to(dtype).view(shape)
    return result


@given(changes(), st.sampled_from(KINDS), st.sampled_from([None, 2, 7, 64]), st.floats(0.01, 1.0))
@settings(max_examples=150, deadline=None)
def test_any_change_comes_back(
    change: dict[str, Tensor], kind: str, block: int | None, fraction: float
) -> None:
    chosen = asked(kind, block=block, fraction=fraction)
    back = there_and_back(change, chosen)
    assert list(back) == list(change)
    x, y = flat(change).astype(np.float64), flat(back).astype(np.float64)
    for name, tensor in change.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.isfinite(back[name]).all()
    assert np.all(y[x == 0] == 0)
    again = compress(dict(reversed(change.items())), chosen)
    assert all(torch.equal(tensor, again[name]) for name, tensor in compress(change, chosen).items())
    largest = np.abs(x).max(initial=0.0)
    half_bound = 2.0**-11 * np.abs(x) + 2.0**-39 * largest + 2.0**-149
    if kind == "none":
        assert np.array_equal(x, y)
        return
    if kind == "bfloat16":
        bound = 2.0**-8 * np.abs(x) + 2.0**-134
    elif kind == "float16":
        bound = half_bound
    elif kind == "top_k":
        kept = np.argsort(-np.abs(x), kind="stable")[: math.ceil(fraction * len(x))]
        bound = np.zeros_like(x)
        bound[kept] = half_bound[kept]
        x[np.setdiff1d(np.arange(len(x)), kept)] = 0
    else:
        levels, worst, default = (127, 0.5, 128) if kind == "int8" else (1, 0.152, 64)
        scales = scales_of(flat(change), block or default, levels).astype(np.float64)
        bound = 1.00001 * worst * np.repeat(scales, block or default)[: len(x)]
    # What comes back is rounded once more, to the tensor's own dtype.
    half_unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    least = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
    last = per_number(change, half_unit) * (np.abs(x) + bound) + per_number(change, least) * (x != 0)
    assert np.all(np.abs(x - y) <= bound + last)


def per_number(change: dict[str, Tensor], values: dict[torch.dtype, float]) -> np.ndarray:
    """The value of each number's dtype, in the order of the stream."""
    parts = [np.full(change[name].numel(), values[change[name].dtype]) for name in sorted(change)]
    return np.concatenate([np.zeros(0), *parts])


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-12, 1e-3, 1e5, 1e38])
def test_int8_is_that_of_numpy(size: int, magnitude: float) -> None:
    change = {"w": normal(size, size).clamp(-3, 3) * magnitude}
    packed = compress(change, asked("int8"))
    x = flat(change)
    scales = scales_of(x, 128, 127)
    numbers = np.clip(np.round(in_blocks(x, 128) / scales[:, None]), -127, 127).reshape(-1)[:size]
    assert np.array_equal(packed["scales"].float().numpy(), scales)
    assert np.array_equal(packed["numbers"].numpy(), numbers)
    back = flat(decompress(packed, change, asked("int8")))
    largest = np.repeat(np.abs(in_blocks(x, 128)).max(1), 128)[:size].astype(np.float64)
    assert np.all(np.abs(x - back.astype(np.float64)) <= largest / 254 * (1 + 2.0**-8) + 2.0**-127)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1001])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-12, 1e-3, 1e5, 1e38])
def test_int4_is_that_of_numpy(size: int, magnitude: float) -> None:
    change = {"w": normal(size, size).clamp(-3, 3) * magnitude}
    packed = compress(change, asked("int4"))
    x = flat(change)
    scales = scales_of(x, 64, 1)
    unit = (in_blocks(x, 64) / scales[:, None]).reshape(-1)[:size]
    levels = NF4.numpy()
    nearest = levels[np.argmin(np.abs(unit[:, None].astype(np.float64) - levels), axis=1)]
    assert np.array_equal(packed["scales"].float().numpy(), scales)
    back = flat(decompress(packed, change, asked("int4")))
    np.testing.assert_allclose(back, nearest * np.repeat(scales, 64)[:size], rtol=1e-6)


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Dettmers et al. 2023: eight levels above zero and seven below, at evenly spaced probabilities up to
    ``(1 - 1/32 + 1 - 1/30) / 2``, divided by the largest.
    """
    top = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.5, top, 9)[1:]])
    below = np.array([NormalDist().inv_cdf(p) for p in np.linspace(0.5, top, 8)[1:]])
    np.testing.assert_allclose(NF4.numpy(), [*(-below[::-1] / above[-1]), 0, *(above / above[-1])], atol=1e-5)


def test_layout_of_four_bits_packed_by_hand() -> None:
    change = {"b": torch.tensor([-4.0]), "a": torch.tensor([[4.0, 0.0], [-1.9, 1.0]])}
    packed = compress(change, asked("int4", block=4))
    # a: 1 -> 15, 0 -> 7, -0.475 -> 2 (-0.525), 0.25 -> 10 (0.246); b, a block of its own: -1 -> 0.
    assert packed["numbers"].tolist() == [15 + 7 * 16, 2 + 10 * 16, 0]
    assert packed["scales"].tolist() == [4.0, 4.0]
    back = decompress(packed, change, asked("int4", block=4))
    assert torch.equal(back["a"], 4 * torch.tensor([[1.0, 0.0], [NF4[2], NF4[10]]]))
    assert back["b"].tolist() == [-4.0]


def test_nf4_beats_integers_on_normal_and_heavy_tailed_numbers() -> None:
    """The figures in compress's docstring, against -7..7 with the best of nine scales for each block."""
    generator = np.random.default_rng(0)
    for numbers, expected in [
        (generator.standard_normal((4000, 64)), 0.092),
        (generator.standard_t(3, (4000, 64)), 0.123),
    ]:
        largest = np.abs(numbers).max(1, keepdims=True)
        errors = [
            ((np.clip(np.round(numbers / step), -7, 7) * step - numbers) ** 2).sum(1)
            for step in largest / 7 * np.linspace(1, 0.6, 9)[:, None, None]
        ]
        change = {"w": torch.from_numpy(numbers).float()}
        ours = (there_and_back(change, asked("int4"))["w"].numpy() - numbers) ** 2
        integers = math.sqrt(np.min(errors, axis=0).sum() / (numbers**2).sum())
        relative = math.sqrt(ours.sum() / (numbers**2).sum())
        assert relative == pytest.approx(expected, abs=0.01)
        assert relative < 0.93 * integers


def test_top_k_is_that_of_numpy() -> None:
    change = {"b": normal(500, 1) * 1e-6, "a": normal(300, 2).view(3, 100) * 1e-6, "c": normal(1, 3)[0]}
    x = flat(change)
    for fraction, kept in [(0.001, 1), (0.01, 9), (0.1, 81), (1.0, 801)]:
        chosen = asked("top_k", fraction=fraction)
        indices = np.argsort(-np.abs(x), kind="stable")[:kept]
        expected = np.zeros_like(x)
        expected[indices] = x[indices]
        np.testing.assert_allclose(flat(there_and_back(change, chosen)), expected, rtol=2.0**-11, atol=1e-11)
        assert len(compress(change, chosen)["numbers"]) == kept


def test_top_k_takes_the_first_of_equals() -> None:
    change = {"w": torch.tensor([1.0, -2.0, 1.0, -1.0, 1.0, 3.0])}
    back = there_and_back(change, asked("top_k", fraction=0.6))
    assert back["w"].tolist() == [1.0, -2.0, 1.0, 0.0, 0.0, 3.0]
    zeros = {"w": torch.zeros(5)}
    assert there_and_back(zeros, asked("top_k", fraction=0.5))["w"].tolist() == [0.0] * 5


@given(st.lists(st.integers(0, 2**35 - 1), max_size=20))
@settings(max_examples=30, deadline=None)
def test_varints(numbers: list[int]) -> None:
    expected = []
    for number in numbers:
        while number > 127:
            expected.append(number % 128 + 128)
            number //= 128
        expected.append(number)
    packed = pack_varints(torch.tensor(numbers, dtype=torch.int64))
    assert packed.tolist() == expected
    assert unpack_varints(packed, len(numbers)).tolist() == numbers


def test_extremes_do_not_become_zero_or_infinite() -> None:
    """Blocks whose scales float16 could not hold, beside each other in one message."""
    sizes = [1e-30, 1e-8, 1.0, 1e5, 1e30]
    change = {"w": torch.cat([normal(128, seed) * size for seed, size in enumerate(sizes)])}
    for kind, worst in [("int8", 0.01), ("int4", 0.12), ("bfloat16", 0.004)]:
        back = there_and_back(change, asked(kind))["w"].view(5, 128)
        for got, original in zip(back.double(), change["w"].view(5, 128).double(), strict=True):
            assert float((got - original).norm() / original.norm()) < worst
    small = {"w": torch.tensor([1e-40, -3e-41]), "v": torch.zeros(3)}
    for kind in ("float16", "top_k"):
        back = there_and_back(small, asked(kind, fraction=0.4))
        assert torch.allclose(back["w"], small["w"], rtol=1e-3, atol=0)
    large = {"w": torch.tensor([3.4e38, -3.4e38, 65504.0, 1.0]), "half": torch.tensor(65504.0).half()}
    for kind in LOSSY:
        back = there_and_back(large, asked(kind, fraction=1.0))
        assert back["w"][:2].tolist() == pytest.approx([3.4e38, -3.4e38], rel=0.005)


# Error feedback


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_sent_and_what_is_left_is_the_sum_of_the_changes(kind: str, dtype: torch.dtype) -> None:
    chosen = asked(kind, fraction=0.1)
    residual: dict[str, Tensor] = {}
    changed = np.zeros(450)
    sent = np.zeros(450)
    for number in range(20):
        change = {
            "b": normal(250, number).to(dtype),
            "a": (normal(200, 100 + number).view(20, 10) * 1e-3).to(dtype),
        }
        packed, residual = compress_with_feedback(change, residual, chosen)
        changed += flat(change)
        sent += flat(decompress(wire.decode(wire.encode(packed, {}))[0], change, chosen))
    assert {tensor.dtype for tensor in residual.values()} == {torch.float32}
    np.testing.assert_allclose(sent + flat(residual), changed, atol=2e-5)
    lossless = kind == "none" or (dtype == torch.bfloat16 and kind in ("float16", "bfloat16"))
    assert flat(residual).any() != lossless


def test_residual_by_hand() -> None:
    chosen = asked("top_k", fraction=0.5)
    packed, residual = compress_with_feedback({"w": torch.tensor([4.0, 3.0])}, {}, chosen)
    assert residual["w"].tolist() == [0.0, 3.0]
    packed, residual = compress_with_feedback({"w": torch.tensor([4.0, 3.0])}, residual, chosen)
    assert decompress(packed, residual, chosen)["w"].tolist() == [0.0, 6.0]
    assert residual["w"].tolist() == [4.0, 0.0]
    with pytest.raises(KeyError):
        compress_with_feedback({"v": torch.zeros(2)}, residual, chosen)


def distance_after(steps: int, feedback: bool, chosen: CompressionSettings) -> float:
    """Gradient descent on the mean of two clients' quadratics |x - c|^2 / 2 with top-1 of 10 coordinates.

    Their first coordinates pull in opposite directions, so hard that each sends that alone; the mean of the
    two is zero.
    """
    target = torch.arange(10.0) / 10
    pull = torch.zeros(10)
    pull[0] = 20.0
    residuals: list[dict[str, Tensor]] = [{}, {}]
    x = torch.zeros(10)
    for step in range(steps):
        sent = torch.zeros(10)
        for client, centre in enumerate((target + pull, target - pull)):
            change = {"x": (centre - x) / (20 + step)}
            if feedback:
                packed, residuals[client] = compress_with_feedback(change, residuals[client], chosen)
            else:
                packed = compress(change, chosen)
            sent += decompress(packed, change, chosen)["x"] / 2
        x = x + sent
    return float((x - target).norm() / target.norm())


def test_descent_converges_with_feedback_and_stalls_without() -> None:
    chosen = asked("top_k", fraction=0.1)
    assert distance_after(300, False, chosen) == pytest.approx(1.0, abs=1e-3)
    assert distance_after(300, True, chosen) < 0.05


# Refusals


def spoiled(kind: str, **replaced: Any) -> tuple[dict[str, Any], dict[str, Tensor], CompressionSettings]:
    """A message of 11 numbers with tensors replaced (None: left out)."""
    change, chosen = {"w": normal(11)}, asked(kind, block=4, fraction=0.3)
    packed: dict[str, Any] = {**compress(change, chosen), **replaced}
    return {name: tensor for name, tensor in packed.items() if tensor is not None}, change, chosen


def half(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float16)


def scales(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.bfloat16)


def some_bytes(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "replaced"),
    [
        ("none", {"w": None}),
        ("none", {"w": torch.zeros(10)}),
        ("none", {"w": torch.zeros(11, 1)}),
        ("none", {"w": torch.zeros(11).half()}),
        ("none", {"w": torch.full((11,), math.nan)}),
        ("none", {"extra": torch.zeros(1)}),
        ("float16", {"numbers": torch.zeros(10).half()}),
        ("float16", {"numbers": torch.zeros(11)}),
        ("float16", {"numbers": torch.full((11,), math.inf).half()}),
        ("float16", {"scales": None}),
        ("float16", {"scales": scales(1, 1)}),
        ("bfloat16", {"numbers": torch.full((11,), math.nan).bfloat16()}),
        ("bfloat16", {"numbers": torch.zeros(12).bfloat16()}),
        ("bfloat16", {"scales": scales(1)}),
        ("int8", {"numbers": torch.zeros(10, dtype=torch.int8)}),
        ("int8", {"numbers": torch.zeros(11, dtype=torch.uint8)}),
        ("int8", {"numbers": torch.zeros(11, 1, dtype=torch.int8)}),
        ("int8", {"numbers": torch.full((11,), -128, dtype=torch.int8)}),
        ("int8", {"scales": scales(1, math.nan, 1)}),
        ("int8", {"scales": scales(1, math.inf, 1)}),
        ("int8", {"scales": scales(1, -1, 1)}),
        ("int8", {"scales": scales(1, 0, 1)}),
        ("int8", {"scales": scales(1, 1)}),
        ("int8", {"scales": torch.ones(3).half()}),
        ("int8", {"extra": torch.zeros(1)}),
        ("int4", {"numbers": torch.zeros(5, dtype=torch.uint8)}),
        ("int4", {"numbers": torch.zeros(6, dtype=torch.int8)}),
        ("int4", {"numbers": torch.full((6,), 16, dtype=torch.uint8)}),
        ("int4", {"scales": scales(1, math.nan, 1)}),
        ("int4", {"scales": scales(1, 1, 1, 1)}),
        ("top_k", {"gaps": some_bytes(0, 0, 0)}),  # four are due
        ("top_k", {"gaps": some_bytes(0, 0, 0, 0, 0)}),
        ("top_k", {"gaps": some_bytes(0, 0, 0, 128)}),  # the last goes on
        ("top_k", {"gaps": some_bytes(0, 0, 0, 0, 128)}),
        ("top_k", {"gaps": some_bytes(0, 0, 0, 8)}),  # index 11 of 11
        ("top_k", {"gaps": some_bytes(0, 0, 0, *[128] * 5, 0)}),  # six bytes
        ("top_k", {"gaps": some_bytes(0, 0, 5, *[128] * 9, 1)}),  # 2^63, which wraps to a negative number
        ("top_k", {"gaps": some_bytes(255, 255, 255, 255, 127, 0, 0, 0)}),
        ("top_k", {"gaps": some_bytes()}),
        ("top_k", {"gaps": some_bytes(0, 0, 0, 0).view(2, 2)}),
        ("top_k", {"gaps": torch.zeros(4, dtype=torch.int32)}),
        ("top_k", {"gaps": None}),
        ("top_k", {"numbers": half(1, 1, 1)}),
        ("top_k", {"numbers": half(1, 1, 1, math.nan)}),
        ("top_k", {"numbers": torch.ones(4)}),
        ("top_k", {"scales": scales(math.nan)}),
        ("top_k", {"scales": scales()}),
    ],
)
def test_malformed_messages_are_refused(kind: str, replaced: dict[str, Tensor | None]) -> None:
    decompress(*spoiled(kind))
    with pytest.raises(WireError):
        decompress(*spoiled(kind, **replaced))


@given(st.lists(st.integers(0, 255), max_size=12), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_no_bytes_name_an_index_twice_or_out_of_range(gaps: list[int], kept: int) -> None:
    """Gaps cannot say a duplicate: what is accepted has as many distinct indices as numbers."""
    like, chosen = {"w": torch.zeros(300)}, asked("top_k", fraction=(kept - 0.5) / 300)
    packed = {"gaps": some_bytes(*gaps), "numbers": torch.ones(kept).half(), "scales": scales(1)}
    try:
        back = decompress(packed, like, chosen)["w"]
    except WireError:
        return
    assert int(back.count_nonzero()) == kept


def test_hostile_scales_do_not_decode_to_infinity() -> None:
    packed, _, chosen = spoiled("int8", scales=scales(3e38, 3e38, 3e38))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.isfinite(decompress(packed, {"w": torch.zeros(11, dtype=dtype)}, chosen)["w"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_compressed_is_refused(kind: str) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(WireError, match="w: a number is NaN or infinite"):
            compress({"v": torch.zeros(2), "w": torch.tensor([0.0, bad])}, asked(kind))
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(WireError, match="w: torch"):
            compress({"w": torch.zeros(2, dtype=dtype)}, asked(kind))
    with pytest.raises(WireError, match="infinite"):
        compress_with_feedback({"w": torch.tensor([3e38])}, {"w": torch.tensor([3e38])}, asked(kind))


def test_settings() -> None:
    assert CompressionSettings().kind == "none"
    for fields in ({"kind": "int2"}, {"fraction": 0.0}, {"fraction": 1.1}, {"block": 1}, {"bits": 4}):
        with pytest.raises(ValidationError):
            CompressionSettings.model_validate(fields)
    assert all(field.description for field in CompressionSettings.model_fields.values())
