"""The recipe's section on secure sums."""

from __future__ import annotations

from pydantic import Field

from ...core.settings import Settings
from .terms import MOST_SITES, Terms

DEFAULT_BOUND = 16.0
"""Largest size of one number of a change, by default."""


class SecureSumSettings(Settings):
    """Secure sums: the server learns the sum of the sites' changes, and no site's own."""

    on: bool = Field(
        False,
        description="Whether clients' changes are summed under masks (deployed), or in the same fixed point "
        "without masks (simulated)",
    )
    threshold: int | None = Field(
        None,
        ge=3,
        le=MOST_SITES,
        description="Fewest clients whose sum is opened, if more than two thirds of them, rounded down, and "
        "one, which is the least in any case",
    )
    colluding: int = Field(
        1,
        ge=0,
        le=MOST_SITES - 2,
        description="Clients that may help a dishonest server: with more of them, more clients have to stay",
    )
    most_examples: int | None = Field(
        None,
        ge=1,
        lt=2**24,
        description="Training examples of the largest client; weights are shares of it. Needed with "
        "aggregation.weighting = 'examples'",
    )
    bound: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Largest size of one number of a change: a client with a larger one is left out. The "
        "smaller, the finer the fixed point; unset: 16",
    )

    def terms(self, least_sites: int = 3) -> Terms:
        """How many clients a sum is of at the least, where a party wants at least so many."""
        return Terms(self.threshold, self.colluding, least_sites)

    @property
    def least_owners(self) -> int:
        """Fewest clients of a label whose sum they let the server see: without those that may help it, the
        sum is still of two.
        """
        return self.colluding + 2

    @property
    def largest(self) -> float:
        """Largest size of one number of a change."""
        return DEFAULT_BOUND if self.bound is None else self.bound
