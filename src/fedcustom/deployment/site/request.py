"""Requests to a site: a message of the engine as typed fields, checked before anything else looks at it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ...core.errors import WireError
from ..replies import Part

Kind = Literal["describe", "open", "work", "evaluate", "secure"]

EVALUATED: tuple[Part, ...] = ("development", "test")
"""Parts of a site's data on which a server may have a state evaluated."""

RUN_ID = re.compile("[0-9a-f]{16}")

TASK = re.compile(r"[A-Za-z0-9_. -]{1,64}")

MAX_ROUND, MAX_KEPT = 10**6, 10**4


@dataclass(frozen=True)
class Request:
    """A request of a run. ``round`` is None outside rounds; ``keep`` are the rounds that the run may go back
    to; ``part`` and ``after`` are of an evaluation; ``body`` is the file of its tensors on this machine.
    ``secure`` is what comes with a task of the others' shares in a secure sum (it is fresh each time, and no
    part of what is asked).
    ``opening`` is the digest of recipe, clients and labels with which the run was opened here.
    """

    kind: Kind
    run: str
    values: dict[str, Any]
    task: str = ""
    round: int | None = None
    keep: tuple[int, ...] | None = None
    part: Part | None = None
    after: int = 0
    layout: Any = None
    body: Path | None = None
    opening: str = ""
    secure: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256, the first 32 digits, of what the request asks, and of the opening of its run: by another
        recipe, the answer to the same words is another one.
        """
        head = [self.kind, self.run, self.values, self.task, self.round, self.part, self.after, self.layout]
        head += [self.opening]
        hashed = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        if self.body is not None and self.body.exists():
            with self.body.open("rb") as file:
                while block := file.read(2**20):
                    hashed.update(block)
        return hashed.hexdigest()[:32]


def read_request(message: Mapping[str, Any]) -> Request:
    """The request that a message holds.

    Raises:
        WireError: a field is missing, of another type or out of bounds. The error names the field and none of
            its content.
    """
    kind, run = message.get("kind"), message.get("run")
    if kind not in get_args(Kind):
        raise WireError(f"a message's kind must be one of {', '.join(get_args(Kind))}")
    if not isinstance(run, str) or not RUN_ID.fullmatch(run):  # it becomes a part of a path
        raise WireError("a message names no run")
    values = message.get("values")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise WireError("a message's values must be an object")
    body = message.get("body")
    request = Request(
        cast(Kind, kind),
        run,
        values,
        body=Path(body) if isinstance(body, str) else None,
        keep=_kept(message.get("keep")),
        layout=message.get("layout"),
    )
    if kind == "work":
        task = message.get("task")
        if not isinstance(task, str) or not TASK.fullmatch(task):
            raise WireError("a message names no task")
        number = message.get("round")
        asked, secure = None if number is None else _whole(number, "round", 1), message.get("secure")
        if secure is not None and not isinstance(secure, str):
            raise WireError("a message's secure must be a text")
        return replace(request, task=task, round=asked, secure=secure)
    if kind == "evaluate":
        part = message.get("part")
        if part not in EVALUATED:
            raise WireError(f"a message's part must be one of {', '.join(EVALUATED)}")
        after = _whole(message.get("after"), "after", 0)
        return replace(request, part=part, after=after)
    return request


def _kept(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_KEPT:
        raise WireError("a message's keep must be a list of rounds")
    return tuple(_whole(number, "keep", 0) for number in value)


def _whole(value: Any, name: str, least: int) -> int:
    if type(value) is not int or not least <= value <= MAX_ROUND:
        raise WireError(f"a message's {name} must be a whole number from {least} to {MAX_ROUND}")
    return value
