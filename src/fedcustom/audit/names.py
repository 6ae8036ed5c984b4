"""Names of the attacks, which are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import RunError, nearest

NAMES = ("sums", "tokens", "candidates", "inversion", "backdoor", "canaries", "membership")
"""Every attack, the quickest first."""


def check_names(names: Sequence[str]) -> None:
    """Refuse an attack that there is not.

    Raises:
        RunError: names it, and those that there are.
    """
    for name in names:
        if name not in NAMES:
            raise RunError(f"--attacks: no attack {name!r}{nearest(name, NAMES)}")
