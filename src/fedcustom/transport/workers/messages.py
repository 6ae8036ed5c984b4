"""What passes between the run's process and its workers, as bytes of the wire format (:mod:`..wire`).

A request is for several clients of one worker: a text (JSON) with their tasks, each client's memory, and the
tasks' tensors, of which clients that are sent the same share one message. An answer is a triple for each
client: a text, its update, and its memory as it is afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from ...core.tensors import Tensors
from ...methods.messages import KEY, Messages, Task, Update
from ...methods.protocol import Memory
from .. import wire
from ..messages import read_task, read_update, values_of
from ..receiving import ClientFailure

ORDER, VALUES = "order", "values"
"""The keys of a message's text: of each tensor its place among the sorted names, and what else there is."""


class ClientAnswer(NamedTuple):
    """One client's answer as it travels; ``update`` and ``memory`` are empty where there is none."""

    told: bytes
    update: bytes
    memory: bytes


@dataclass(frozen=True)
class ClientRequest:
    """One client's part of a request, as the worker reads it. ``folder`` is where it may keep files."""

    name: str
    task: Task
    memory: Memory
    folder: str | None


def encode_tensors(tensors: Tensors) -> bytes:
    """The message of tasks' tensors."""
    return _encoded(tensors, {})


def encode_memory(memory: Memory) -> bytes:
    """The message of what a client remembers."""
    return _encoded(memory.tensors, memory.values)


def decode_memory(payload: bytes) -> Memory:
    """The inverse of :func:`encode_memory`."""
    return Memory(*_decoded(payload))


def encode_request(tasks: Mapping[str, Task], places: Sequence[int], folders: Sequence[str | None]) -> bytes:
    """The text of a request; ``places`` are those of each task's tensors among the messages of these."""
    clients = [
        {"client": name, "kind": task.kind, "values": values_of(task), "tensors": place, "folder": folder}
        for (name, task), place, folder in zip(tasks.items(), places, folders, strict=True)
    ]
    return json.dumps(clients).encode()  # names as they are: the wire format cleans texts


def decode_request(
    messages: Messages, head: bytes, memories: Sequence[bytes], tensors: Sequence[bytes]
) -> list[ClientRequest]:
    """The clients' parts of a request. Those that are sent the same tensors share them.

    Raises:
        WireError: the method has no such task, or a message is malformed.
    """
    shared = [_decoded(payload)[0] for payload in tensors]
    return [
        ClientRequest(
            one["client"],
            read_task(messages, one["kind"], one["values"], shared[one["tensors"]]),
            decode_memory(memory),
            one["folder"],
        )
        for one, memory in zip(json.loads(head), memories, strict=True)
    ]


def encode_answer(update: Update, memory: Memory, seconds: float) -> ClientAnswer:
    """A client's update, and what it remembers."""
    content = _encoded(update.tensors, values_of(update))
    return ClientAnswer(_told(seconds=seconds), content, encode_memory(memory))


def encode_failure(reason: str, detail: str, seconds: float) -> ClientAnswer:
    """Why a client gave none."""
    return ClientAnswer(_told(seconds=seconds, reason=reason, detail=detail), b"", b"")


def decode_answer(messages: Messages, task: Task, answer: ClientAnswer) -> tuple[Update, Memory]:
    """An update that answers a task, and what the client remembers.

    Raises:
        ClientFailure: there is none; says why.
        WireError: the answer is malformed.
    """
    told = json.loads(answer.told)
    if "reason" in told:
        raise ClientFailure(told["reason"], told["detail"])
    tensors, values = _decoded(answer.update)
    return _as_made(read_update(messages, task, values, tensors), values), decode_memory(answer.memory)


def seconds_of(answer: ClientAnswer) -> float:
    """The seconds that a client took, whether it gave an update or not."""
    return float(json.loads(answer.told)["seconds"])


def _as_made(update: Update, values: Mapping[str, Any]) -> Update:
    """The update with whole numbers where its client wrote such in place of floats, as 4 and not 4.0: the
    length of its message is counted from it.
    """
    found = {one.name: (getattr(update, one.name), one.metadata.get(KEY, one.name)) for one in fields(update)}
    changed: dict[str, Any] = {
        n: _whole(read, values[key]) for n, (read, key) in found.items() if key in values
    }
    return replace(update, **changed)


def _whole(read: Any, sent: Any) -> Any:
    """A value as it was read, with the whole numbers that were sent in place of floats."""
    if type(read) is float and type(sent) is int:
        return sent
    if isinstance(read, dict) and isinstance(sent, dict):
        return {key: _whole(value, sent[key]) for key, value in read.items()}
    if isinstance(read, list | tuple) and isinstance(sent, list) and type(read) in (list, tuple):
        return type(read)(_whole(*pair) for pair in zip(read, sent, strict=True))
    return read


def _encoded(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    """A message that tells the tensors' order too: by it, norms of several are added up."""
    places = {name: place for place, name in enumerate(sorted(tensors))}
    return wire.encode(tensors, {ORDER: [places[name] for name in tensors], VALUES: dict(values)})


def _decoded(payload: bytes) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, in their order, and values of such a message. Each tensor has memory of its own: where it
    begins in a message depends on the text, and on that how a processor adds up its numbers.
    """
    tensors, values = wire.decode(payload)
    names = sorted(tensors)
    return {name: tensors[name].clone() for name in map(names.__getitem__, values[ORDER])}, values[VALUES]


def _told(**values: Any) -> bytes:
    return json.dumps(values).encode()
