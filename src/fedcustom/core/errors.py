"""Errors that a user can mend: one clear line each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class FedcustomError(Exception):
    """Something a user can mend: one line that says what, where and what is allowed. Commands exit with
    code 2.
    """


class RecipeError(FedcustomError):
    """A setting is unknown, of the wrong type or impossible."""


class DataError(FedcustomError):
    """A source cannot be read, a row is malformed, a client has nothing to train on."""


class TooLongError(DataError):
    """A conversation is longer than ``data.max_length`` with its last exchange alone, which is never cut."""


class ModelError(FedcustomError):
    """A base model cannot be loaded, or a method does not fit it."""


class WireError(FedcustomError):
    """A message is truncated, malformed or larger than allowed."""


class SecureSumError(WireError):
    """A message of a secure sum is not what the protocol allows: forged, of another round, or out of turn."""


class UpdateError(FedcustomError):
    """A client's update has the wrong names, shapes or dtypes, or numbers that are not finite."""


class AggregationError(FedcustomError):
    """Clients' updates gave a state that cannot be trained from; the round is refused, the run goes on."""


class RunError(FedcustomError):
    """A run cannot start, go on or be read."""


class ExportError(RunError):
    """An exported model does not load, or does not give the outputs of the trained one."""


class DeploymentError(FedcustomError):
    """A federation of sites cannot be made, reached or joined."""


class PluginError(FedcustomError):
    """What another package offers as a plug-in cannot be loaded, or does not do what it must."""


class PolicyError(FedcustomError):
    """A site's own policy forbids what it was asked."""


def nearest(name: str, allowed: Sequence[str]) -> str:
    """``; allowed: a, b; did you mean 'a'?`` for an error message."""
    close = difflib.get_close_matches(name, allowed, n=1)
    listed = ", ".join(allowed[:20]) + (", ..." if len(allowed) > 20 else "")
    return f"; allowed: {listed or 'none'}" + (f"; did you mean {close[0]!r}?" if close else "")
