"""The gate: what another party sends is refused by a bound, or read; nothing else comes of it."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core import bounded_json
from fedcustom.core.errors import WireError
from fedcustom.transport import gate, wire
from helpers.fuzz import mutated, understand, well_formed

SIZE = 8


def body(header: dict[str, Any] | bytes, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(dtype: str = "F32", shape: Any = (2,), place: Any = (0, SIZE)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


TEXTS: dict[str, Any] = {
    "an integer of 401 digits": '{"examples": 1' + "0" * 400 + "}",
    "an integer of 20 digits": json.dumps({"examples": 2**64}),
    "beyond 1e": '{"loss": 1e308}',
    r"beyond 1e\+30": '{"loss": 1e999}',
    "NaN is no number": '{"loss": NaN}',
    "Infinity is no number": '{"loss": -Infinity}',
    r"holds \\ud800": r'{"error": "\ud800"}',
    r"holds \\x1b": r'{"error": "\u001b[2J"}',
    r"key holds \\x00": r'{"\u0000": 1}',
    "deeper than 24": '{"x":' + "[" * 40 + "]" * 40 + "}",
    "deeper than": '{"x":' * 975 + "1" + "}" * 975,
    "deeper than 24 lists": "[" * 90_000,
    "more than 100,000 lists": "[" * 200_000,
    "more than 1,000,000 values": '{"x": [' + "0," * 1_000_001 + "0]}",
    "occurs twice": '{"weight": 1, "weight": 2}',
    "must be a JSON object": "[1]",
    "of 513 characters": json.dumps({"k" * 513: 1}),
    "Expecting": '{"x": }',
    "Unterminated": '{"x": "' + '\\"' * 100_000,
}


@pytest.mark.parametrize("message", TEXTS)
def test_json_beyond_a_bound_is_refused_at_once(message: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(WireError, match=message):
        bounded_json.read_json(TEXTS[message].encode())
    assert time.perf_counter() - begun < 5
    with pytest.raises(WireError, match=message):
        bounded_json.read_json(TEXTS[message])


def test_json_is_bounded_by_its_length_and_encoding() -> None:
    with pytest.raises(WireError, match="at most 10"):
        bounded_json.read_json(b'{"text": "long"}', limit=10)
    for encoding in ("utf-16", "utf-32", "latin-1"):
        with pytest.raises(WireError, match=r"malformed"):
            bounded_json.read_json('{"text": "é"}'.encode(encoding))


def test_what_is_within_the_bounds_is_read() -> None:
    values = {"a": [1, -(2**63) + 1, 1e30, "x\ny\tz", None, True], "é": {"b": {"c": []}}}
    deep: Any = 1
    for _ in range(bounded_json.MAX_DEPTH - 1):
        deep = [deep]
    values["deep"] = deep
    assert bounded_json.read_json(json.dumps(values)) == values
    many = {"x": list(range(1000)), "text": "[" * 1000 + '"\\' + "{" * 1000}
    assert bounded_json.read_json(json.dumps(many)) == many


HEADERS: dict[str, bytes] = {
    "F4 cannot travel": body({"w": entry("F4", (16,))}, bytes(SIZE)),
    "F8_E8M0 cannot travel": body({"w": entry("F8_E8M0", (8,))}, bytes(SIZE)),
    "an integer of 19 digits": body({"w": entry(shape=(0, 2**63), place=(0, 0))}),
    "no shape": body({"w": entry(shape=(0, 2**62), place=(0, 0))}),
    "w: no shape": body({"w": entry(shape=(2**40, 2**40, 0), place=(0, 0))}),
    "malformed: w: no shape": body({"w": entry(shape=(1,) * 9, place=(0, 4))}, bytes(4)),
    "its shape does not fit": body({"w": entry(shape=(3,))}, bytes(SIZE)),
    "message is malformed: w: its shape": body({"w": entry(shape=(2,), place=(8, 0))}, bytes(SIZE)),
    "overlap": body({"v": entry(), "w": entry()}, bytes(SIZE)),
    "leave gaps": body({"w": entry(place=(8, 16))}, bytes(16)),
    "do not fill": body({"w": entry()}, bytes(12)),
    "no place": body({"w": {**entry(), "data_offsets": [0, True]}}, bytes(SIZE)),
    "no tensor": body({"w": {"dtype": "F32"}}),
    "__metadata__: no tensor": body({"__metadata__": {"format": "pt"}}),
    "truncated": b"1234567",
    "truncated or malformed": struct.pack("<Q", 2**63) + b"{}",
    "at most 4": body({"w": entry()}, bytes(SIZE)),
}


@pytest.mark.parametrize("message", HEADERS)
def test_tensors_are_refused_by_their_header(message: str, tmp_path: Path) -> None:
    limit = 4 if message == "at most 4" else 1000
    with pytest.raises(WireError, match=message):
        gate.read_tensors(HEADERS[message], limit)
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(HEADERS[message])
    with pytest.raises(WireError, match=message):
        gate.read_tensor_file(path, limit)


def test_sound_tensors_are_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 2), "b": torch.zeros(0, 4), "s": torch.tensor(1, dtype=torch.int64)}
    payload = safetensors.torch.save(tensors)
    (tmp_path / "x").write_bytes(payload)
    for found in (gate.read_tensors(payload, 1000), gate.read_tensor_file(tmp_path / "x", 1000)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(WireError, match="did not get through"):
        gate.read_tensor_file(tmp_path / "missing", 1000)


@given(st.text(st.characters(codec=None)))
def test_a_cleaned_text_passes_and_a_clean_one_stays(text: str) -> None:
    values = bounded_json.clean({"text": text, text: [text]})
    assert bounded_json.read_json(json.dumps(values)) == values
    assert bounded_json.clean(values) == values
    assert bounded_json.read_json(bounded_json.write_json({"text": text, "x": [text]})) == bounded_json.clean(
        {"text": text, "x": [text]}
    )
    _, back = wire.decode(wire.encode({}, {"text": text}))
    assert len(back["text"]) == len(text)


@given(st.integers(0, 2**64 - 1))
@settings(max_examples=500)
def test_mutated_messages_are_read_or_refused(seed: int) -> None:
    payload = mutated(well_formed(seed), seed)
    try:
        tensors, values = wire.decode(payload, limit=2**20)
        understand(values, seed)
    except WireError:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= len(payload)
    json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
    assert all(math.isfinite(x) for x in values.values() if isinstance(x, float))
