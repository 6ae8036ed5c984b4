"""The wire format: what goes in comes out, byte counts are true, and bad messages are refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import WireError
from fedcustom.transport import wire

UNCLEAN = "".join(map(chr, {*range(32), 127} - {9, 10, 13}))
texts = st.text(st.characters(codec="utf-8", exclude_characters=UNCLEAN), max_size=12)
names = texts.filter(lambda name: name not in ("", "__metadata__"))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8])
shapes = st.lists(st.integers(0, 4), max_size=3)
values = st.dictionaries(
    texts,
    st.one_of(st.integers(-(2**53), 2**53), st.floats(-1e30, 1e30), texts, st.lists(st.booleans())),
    max_size=4,
)


@st.composite
def tensors(draw: Any) -> dict[str, torch.Tensor]:
    chosen = draw(st.dictionaries(names, st.tuples(dtypes, shapes), max_size=4))
    return {
        name: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        for name, (dtype, shape) in chosen.items()
    }


@given(tensors(), values)
@settings(max_examples=100, deadline=None)
def test_round_trip_and_length(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    payload = wire.encode(tensors, values)
    assert wire.length(tensors, values) == len(payload)
    back, said = wire.decode(payload)
    assert said == values
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_bfloat16_is_bit_exact() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    back, _ = wire.decode(wire.encode({"w": bits.view(torch.bfloat16)}, {}))
    assert torch.equal(back["w"].view(torch.int16), bits)


def test_views_travel_as_what_they_show() -> None:
    base = torch.arange(12.0).view(3, 4)
    back, _ = wire.decode(wire.encode({"column": base[:, 1], "transposed": base.t()}, {}))
    assert torch.equal(back["column"], torch.tensor([1.0, 5.0, 9.0]))
    assert torch.equal(back["transposed"], base.t())


@given(st.binary(max_size=80))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(payload)


@given(st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_truncated_messages_are_refused(cut: int) -> None:
    payload = wire.encode({"w": torch.ones(20)}, {"loss": 1.0})
    with pytest.raises(WireError):
        wire.decode(payload[: min(cut, len(payload) - 1)])


def test_limits_and_types() -> None:
    payload = wire.encode({"w": torch.ones(20)}, {})
    with pytest.raises(WireError, match="at most 10"):
        wire.decode(payload, limit=10)
    with pytest.raises(WireError, match="complex64"):
        wire.encode({"w": torch.ones(1, dtype=torch.complex64)}, {})
    with pytest.raises(WireError, match="can travel"):
        wire.encode({}, {"client": object()})
    text = json.dumps([1]).encode()
    with pytest.raises(WireError, match="object"):
        wire.decode(struct.pack("<Q", len(text)) + text + wire.encode({}, {})[10:])
