"""Messages, and what a malicious party makes of them."""

from __future__ import annotations

import json
import random
import struct

import torch

from fedcustom.deployment.site.request import read_request
from fedcustom.methods.distillation import messages as distillation
from fedcustom.methods.messages import Messages
from fedcustom.methods.prompt_engineering import messages as prompt_engineering
from fedcustom.methods.retrieval import messages as retrieval
from fedcustom.methods.tuning import messages as tuning
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.methods.untuned import messages as untuned
from fedcustom.transport import wire
from fedcustom.transport.messages import read_task, read_update

NUMBERS = ["1e308", "1e999", "-0", "1" + "0" * 400, "NaN", "Infinity", "9223372036854775808", "true", "null"]
TEXTS = ['"\\ud800"', '"\\u001b[2J"', '"[/x]"', '"' + "x" * 600 + '"', "[" * 300, '{"a":' * 50, '"\\', "[]"]
DTYPES = ["F4", "F8_E8M0", "F32", "BOOL", "I64", "U64", "C64", "F128", ""]
DIMENSIONS = [0, 1, 2**31, 2**62, 2**63, 2**64, -1]

METHODS: list[Messages] = [
    *(tuning.MESSAGES, tuning.SUMMED_KINDS, distillation.MESSAGES, retrieval.MESSAGES),
    *(prompt_engineering.SELECTION, prompt_engineering.IN_CONTEXT, prompt_engineering.BLACK_BOX),
    untuned.SHOTS,
]
TASKS: list[dict[str, object]] = [
    {"round": 1, "learning_rate_factor": 1.0, "epochs": 1, "label_counts": [3, 4]},
    {"round": 2, "learning_rate_factor": 1.0, "model": 0, "steps": 5},
    {"encoder": "ab" * 32, "top": 5, "texts": ["a"]},
    {"encoder": "ab" * 32, "question": "why?", "documents": ["a", "b"]},
    {"round": 1, "candidates": [1, 2], "bred": {"7": {"template": "{x}", "labels": ["a"], "origin": "b"}}},
]
UPDATES: list[dict[str, object]] = [
    {"weight": 3.0, "loss": 0.5, "examples": 3, "steps": 1},
    {"weight": 3.0, "tallies": {"1": [3, 1.0, -2.0]}, "examples": 3},
    {"weight": 1.0, "passages": {"a": "text"}},
    {"weight": 1.0, "documents": 4, "chunks": 9},
]
RUN = "0123456789abcdef"
REQUESTS: list[dict[str, object]] = [
    {"kind": "work", "run": RUN, "task": "train", "round": 1, "keep": [1], "values": TASKS[0]},
    {"kind": "evaluate", "run": RUN, "part": "test", "after": 1, "values": {}},
    {"kind": "describe", "run": RUN, "values": {"recipe": {"model": {"base": "a"}}}},
]


def understand(values: dict[str, object], seed: int) -> None:
    """Read values as a task, an update or a request of a run, as both ends do.

    Raises:
        WireError: they are none.
    """
    chance = random.Random(seed)
    messages, what = chance.choice(METHODS), chance.randrange(3)
    if what == 0:
        read_task(messages, chance.choice([*messages, "none", None, 7]), values)
    elif what == 1:
        task = TrainTask({}, round_number=1)
        read_update({task.kind: chance.choice(list(messages.values()))}, task, values)
    else:
        read_request(values)


def well_formed(seed: int) -> bytes:
    """A sound message: some tensors and values."""
    chance = random.Random(seed)
    tensors = {
        f"layer.{number}": torch.zeros([chance.randrange(4) for _ in range(chance.randrange(3))])
        for number in range(chance.randrange(4))
    }
    return wire.encode(tensors, chance.choice([*TASKS, *UPDATES, *REQUESTS]))


def mutated(payload: bytes, seed: int) -> bytes:
    """The message with some bytes, numbers, lengths or parts replaced."""
    chance = random.Random(seed)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        payload = chance.choice(MUTATIONS)(payload, chance)
    return payload


def _bytes(payload: bytes, chance: random.Random) -> bytes:
    if not payload:
        return payload
    place = chance.randrange(len(payload))
    return payload[:place] + chance.randbytes(chance.randint(0, 4)) + payload[place + chance.randrange(4) :]


def _truncated(payload: bytes, chance: random.Random) -> bytes:
    return payload[: chance.randrange(len(payload) + 1)]


def _length(payload: bytes, chance: random.Random) -> bytes:
    length = chance.choice([0, 1, len(payload), 2**32, 2**63, 2**64 - 1, chance.randrange(64)])
    return struct.pack("<Q", length) + payload[8:]


def _values(payload: bytes, chance: random.Random) -> bytes:
    """Another value in the JSON, of the right length."""
    text, rest = _split(payload)
    new = chance.choice(NUMBERS + TEXTS)
    keys = [place for place, character in enumerate(text) if character == ":"]
    if not keys:
        text = f'{{"x":{new}}}'
    else:
        start = chance.choice(keys) + 1
        end = min(
            (place for place in (text.find(",", start), text.find("}", start)) if place > 0), default=start
        )
        text = text[:start] + new + text[end:]
    return _joined(text, rest)


def _header(payload: bytes, chance: random.Random) -> bytes:
    """Another dtype, shape or place of a tensor, of the right length."""
    text, rest = _split(payload)
    if len(rest) < 8:
        return payload
    (size,) = struct.unpack_from("<Q", rest)
    try:
        header = json.loads(rest[8 : 8 + size])
        entry = header[chance.choice(sorted(header))]
        what = chance.choice(["dtype", "shape", "data_offsets", "more"])
        if what == "dtype":
            entry["dtype"] = chance.choice(DTYPES)
        elif what == "more":
            header[chance.choice(["__metadata__", "copy", "\ud800", "\x1b"])] = dict(entry)
        else:
            entry[what] = [chance.choice(DIMENSIONS) for _ in range(chance.randint(0, 3))]
    except (ValueError, IndexError, AttributeError, TypeError, KeyError):
        return payload
    new = json.dumps(header).encode()
    return _joined(text, struct.pack("<Q", len(new)) + new + rest[8 + size :])


def _split(payload: bytes) -> tuple[str, bytes]:
    size = struct.unpack_from("<Q", payload)[0] if len(payload) >= 8 else 0
    return payload[8 : 8 + size].decode("utf-8", "replace"), payload[8 + size :]


def _joined(text: str, rest: bytes) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded + rest


MUTATIONS = [_bytes, _truncated, _length, _values, _header]
