"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the check's name.
        status: ``ok``; ``absent``: something optional is not there; ``warning``: it works, and less well than
            it could; ``failed``: something will not work; ``unknown``: the check itself failed.
        found: what was found.
        remedy: what helps, in most cases a command; empty where nothing has to be done.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""
