"""The registry of attacks."""

from __future__ import annotations

from collections.abc import Sequence

from .attack import Attack
from .backdoor import Backdoor
from .canaries import Canaries
from .candidates import Candidates
from .inversion import Inversion
from .membership import Membership
from .names import NAMES, check_names
from .sums import Sums
from .tokens import Tokens

_ALL: list[Attack] = [Sums(), Tokens(), Candidates(), Inversion(), Backdoor(), Canaries(), Membership()]

ATTACKS: dict[str, Attack] = {name: next(each for each in _ALL if each.name == name) for name in NAMES}
"""Every attack by its name."""


def chosen(names: Sequence[str]) -> list[Attack]:
    """The attacks of these names, in the registry's order; all of them for none.

    Raises:
        RunError: there is no such attack.
    """
    check_names(names)
    return [attack for name, attack in ATTACKS.items() if not names or name in names]
