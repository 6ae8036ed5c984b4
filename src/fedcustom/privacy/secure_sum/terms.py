"""How many sites a secure sum is of."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import SecureSumError

MOST_SITES = 128
"""Sites of a round: each has a mask with every other."""

LEAST_SITES = 3
"""Of the sum of two sites each knows the other's vector."""


@dataclass(frozen=True)
class Terms:
    """How many sites a sum is of at the least.

    Attributes:
        threshold: Fewest sites whose sum is opened, where more are wanted than follow from the others.
        colluding: How many sites may help a dishonest server.
        least_sites: Fewest sites on the roster, and in the sum.
    """

    threshold: int | None = None
    colluding: int = 1
    least_sites: int = LEAST_SITES

    def needed(self, count: int) -> int:
        """How many of ``count`` sites have to stay, t. It is ⌊2 count / 3⌋ + 1, or more where
        ``threshold`` says so, where ``colluding`` sites could sign two lists of survivors
        (2 t - count <= colluding), or where fewer than two others would be left in the sum.

        Raises:
            SecureSumError: there are too few sites, or too many.
        """
        if count > MOST_SITES:
            raise SecureSumError(f"a secure sum of {count} sites: at most {MOST_SITES} are possible")
        if count < max(self.least_sites, LEAST_SITES):
            least = max(self.least_sites, LEAST_SITES)
            raise SecureSumError(f"a secure sum of {count} sites: at least {least} are needed")
        least = max(2 * count // 3 + 1, (count + self.colluding) // 2 + 1, self.colluding + 2)
        needed = max(least, self.threshold or 0)
        if needed > count:
            raise SecureSumError(
                f"a secure sum of {count} sites: {needed} would have to stay "
                f"(secure_sum.threshold = {self.threshold}, secure_sum.colluding = {self.colluding})"
            )
        return needed
