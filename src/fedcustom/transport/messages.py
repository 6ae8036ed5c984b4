"""Messages as JSON: the values of tasks and updates that travel beside their tensors, and back, checked.

A message is a dataclass (:class:`~fedcustom.methods.messages.Task` or
:class:`~fedcustom.methods.messages.Update`); its fields say what travels and what is allowed. Nothing here
knows a method.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic import BaseModel, ConfigDict, ValidationError

from ..core.errors import WireError, nearest
from ..core.tensors import Tensors
from ..methods.messages import INLINE, KEY, Messages, Task, Update
from ..methods.protocol import Values
from ..updates.transform import EncodedUpdate

T = TypeVar("T", Task, Update)

TENSORS = "tensors"
"""The field that travels as tensors."""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

LONGEST_NAME = 60
"""Characters of a key that an error shows."""


def values_of(message: Task | Update) -> Values:
    """What travels of a message beside its tensors and its kind, by key."""
    return _values(message.answer if isinstance(message, EncodedUpdate) else message)


def read_task(messages: Messages, kind: object, values: object, tensors: Tensors | None = None) -> Task:
    """A task of one of a method's ``messages`` from the values that travelled.

    Raises:
        WireError: the kind is unknown; a key is unknown or missing, or its value is of another type or beyond
            its bounds. The message names the kind and the key.
    """
    if not isinstance(kind, str) or kind not in messages:
        name = _shown(kind) if isinstance(kind, str) else type(kind).__name__
        raise WireError(f"task '{name}': the run's method has no such task{nearest(name, list(messages))}")
    return _read(messages[kind].task, f"task {kind!r}", values, tensors)


def read_update(messages: Messages, task: Task, values: object, tensors: Tensors | None = None) -> Update:
    """The update that answers a task, from the values that travelled.

    Raises:
        WireError: see :func:`read_task`.
    """
    return _read(messages[task.kind].update, f"answer to {task.kind!r}", values, tensors)


class _Entry(NamedTuple):
    """One key of a message: its type, and whether it must be there."""

    key: str
    hint: Any
    required: bool


def _values(message: Any) -> Values:
    found: Values = {}
    for each in fields(message):
        value = getattr(message, each.name)
        if each.name == TENSORS or (_optional(each) and value is each.default):
            continue
        found |= _values(value) if INLINE in each.metadata else {_key(each): _plain(value)}
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it: lists for tuples, objects for dataclasses."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return _values(value) if is_dataclass(value) else value


def _read(message: type[T], name: str, values: object, tensors: Tensors | None) -> T:
    if not isinstance(values, dict):
        raise WireError(f"{name}: its values must be a JSON object")
    form: Any = message
    entries = {entry.key: entry for entry in _entries(form)}
    for key in values:
        if key not in entries:
            raise WireError(f"{name}: unknown key '{_shown(key)}'{nearest(_shown(key), list(entries))}")
    for entry in entries.values():
        if entry.required and entry.key not in values:
            raise WireError(f"{name}: {entry.key} is missing")
    try:  # as text, of which the checks know that JSON has no tuples
        checked = _schema(form).model_validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(_shown(str(part)) for part in first["loc"])
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise WireError(f"{name}: {where or 'its values'}: {reason}") from None
    except (TypeError, ValueError, RecursionError):
        raise WireError(f"{name}: its values are malformed") from None
    found = {key: getattr(checked, f"field_{place}") for place, key in enumerate(entries) if key in values}
    made: T = _built(form, found)
    return made if tensors is None else replace(made, tensors=tensors)


def _built(message: Any, found: Mapping[str, Any]) -> Any:
    """An instance with the values that were found, by key; the others are those by default."""
    hints, arguments = _hints(message), {}
    for each in fields(message):
        if INLINE in each.metadata:
            arguments[each.name] = _built(hints[each.name], found)
        elif each.name != TENSORS and _key(each) in found:
            arguments[each.name] = found[_key(each)]
    return message(**arguments)


@cache
def _schema(message: Any) -> type[BaseModel]:
    """The check of a message's values."""
    entries: dict[str, Any] = {
        f"field_{place}": (entry.hint, pydantic.Field(*([] if entry.required else [None]), alias=entry.key))
        for place, entry in enumerate(_entries(message))
    }
    return pydantic.create_model(message.__name__, __config__=STRICT, **entries)


@cache
def _entries(message: Any) -> tuple[_Entry, ...]:
    return tuple(_all_entries(message))


def _all_entries(message: Any) -> Iterator[_Entry]:
    hints = _hints(message)
    for each in fields(message):
        if INLINE in each.metadata:
            yield from _entries(hints[each.name])
        elif each.name != TENSORS:
            yield _Entry(_key(each), _without_none(hints[each.name]), not _optional(each))


@cache
def _hints(message: Any) -> dict[str, Any]:
    return get_type_hints(message, include_extras=True)


def _key(each: Field[Any]) -> str:
    key: str = each.metadata.get(KEY, each.name)
    return key


def _optional(each: Field[Any]) -> bool:
    """Whether a field is left out where it has its default."""
    return each.default is not MISSING and (each.default is None or each.default is False)


def _without_none(hint: Any) -> Any:
    """A type without None, which does not travel."""
    if get_origin(hint) in (Union, UnionType):
        kept = tuple(each for each in get_args(hint) if each is not NoneType)
        return kept[0] if len(kept) == 1 else Union[kept]  # noqa: UP007
    return hint


def _shown(text: str) -> str:
    """A text of another party, short and in plain characters, for an error."""
    return text[:LONGEST_NAME].encode("unicode_escape").decode()
