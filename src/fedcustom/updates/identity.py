"""The identity of a transform: by which a run that goes on notices that its transforms are others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from ..core.errors import RecipeError
from .transform import UpdateTransform

Identity = dict[str, Any]

PLAIN = (bool, int, float, str, tuple, list, dict, frozenset, set)
"""Of a class's attributes, those that are settings; others are methods, or tools."""


def identity_of(transform: UpdateTransform) -> Identity:
    """The name of a transform's class, its own name, and its settings as JSON values: those that its
    ``identity()`` gives, or its public attributes.

    Raises:
        RecipeError: an attribute is no JSON value; names it.
    """
    own = getattr(transform, "identity", None)
    told: Mapping[str, Any] | None = own() if callable(own) else None
    settings = dict(_attributes(transform)) if told is None else dict(told)
    try:
        found = {str(key): _plain(value, str(key)) for key, value in settings.items()}
    except _NoJson as error:
        raise RecipeError(
            f"transform {transform.name!r}: its {error} cannot be written down, so that a resumed run could "
            "not be told from another; begin the attribute's name with an underscore if it is no setting, or "
            "define identity()"
        ) from None
    return {"class": type(transform).__qualname__, "name": transform.name, "settings": found}


def in_words(identities: Sequence[Identity]) -> str:
    """Transforms as one would construct them: ``Clip(bound=1.0), Noise(scale=0.5)``; ``none`` for none."""
    texts = [
        f"{each['class']}({', '.join(f'{key}={value!r}' for key, value in each['settings'].items())})"
        for each in identities
    ]
    return ", ".join(texts) or "none"


class _NoJson(Exception):
    """A value that JSON cannot hold, by the place where it stands."""


def _attributes(transform: object) -> Iterator[tuple[str, Any]]:
    """Public attributes of the object and, of plain values, of its classes."""
    found: dict[str, Any] = {}
    for kind in reversed(type(transform).__mro__):
        if kind in UpdateTransform.__mro__:
            continue
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(transform, name):
                found[name] = getattr(transform, name)
        found |= {name: value for name, value in vars(kind).items() if isinstance(value, PLAIN)}
    found |= vars(transform) if hasattr(transform, "__dict__") else {}
    own = {name for name in found if not name.startswith("_")} - vars(UpdateTransform).keys()
    return ((name, found[name]) for name in sorted(own))


def _plain(value: Any, where: str) -> Any:
    """A value as JSON holds it; numbers that are not finite as text."""
    match value:
        case None | bool() | str():
            return value
        case Enum():
            return _plain(value.value, where)
        case Integral():
            return int(value)
        case Real():
            number = float(value)
            return number if math.isfinite(number) else str(number)
        case PurePath():
            return str(value)
        case BaseModel():
            return value.model_dump(mode="json")
        case Mapping():
            return {str(key): _plain(each, f"{where}[{key!r}]") for key, each in value.items()}
        case set() | frozenset():
            return sorted((_plain(each, where) for each in value), key=repr)
        case list() | tuple():
            return [_plain(each, f"{where}[{place}]") for place, each in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        return {name: _plain(each, f"{where}.{name}") for name, each in parts.items()}
    raise _NoJson(f"{where} ({type(value).__name__})")
