"""Plug-ins: what other installed packages offer under this package's entry-point groups."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError

METHODS = "fedcustom.methods"
AGGREGATION = "fedcustom.aggregation"
PARTITIONS = "fedcustom.partitions"

_log = logging.getLogger("fedcustom.plugins")


@cache
def _installed() -> Any:  # its type depends on the version of Python
    """The entry points of all installed packages, whose files are read once for all groups."""
    return entry_points()


@cache
def offered(group: str, taken: Collection[str] = ()) -> dict[str, EntryPoint]:
    """The entry points of a group by name, in the order of their names; nothing of them is imported yet.

    One whose name is ``taken``, by this package or by another plug-in, is left out, with a line on the log.

    Args:
        group: :data:`METHODS`, :data:`AGGREGATION` or :data:`PARTITIONS`.
        taken: Names that belong to this package.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(_installed().select(group=group), key=lambda each: (each.name, each.value)):
        if point.name in found and found[point.name].value == point.value:
            continue  # one package, found in two places
        if point.name in taken or point.name in found:
            owner = package_of(found[point.name]) if point.name in found else "fedcustom"
            report(point, f"the name belongs to {owner}")
        else:
            found[point.name] = point
    return found


def load(point: EntryPoint) -> Any:
    """What an entry point stands for.

    Raises:
        PluginError: it cannot be imported; the message is one line that names the package.
    """
    try:
        return point.load()
    except Exception as error:  # whatever the other package's code raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PluginError(f"{title(point)} cannot be loaded: {type(error).__name__}: {reason}") from error


def report(point: EntryPoint, reason: str) -> None:
    """Say on the log, in one line, why a plug-in is left out; the others stay."""
    _log.warning("%s is left out: %s", title(point), reason)


def title(point: EntryPoint) -> str:
    """A plug-in in words: its package, group and name."""
    return f"plug-in {point.name!r} ({point.group}) of package {package_of(point)!r}"


def package_of(point: EntryPoint) -> str:
    """The installed package that an entry point belongs to."""
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
