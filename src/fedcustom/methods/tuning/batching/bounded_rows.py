"""Bounded rows: what a cohort's steps do to gradients where each training row is hidden (DP-SGD)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ....core.tensors import Tensors
from ....privacy.clipping import groups_of
from ....privacy.example_mechanism import RowPrivacy
from ....privacy.row_clipping import clipped_row_sums

MOST_BYTES = 256 * 2**20
"""Of the gradients of a pass's rows, all passes that run at a time together."""


class BoundedRows:
    """The privacy of clients, one :class:`~fedcustom.privacy.example_mechanism.RowPrivacy` each, in a cohort
    that trains the tensors of these ``names``, those of the ``head`` among them.
    """

    def __init__(
        self, privacies: Sequence[RowPrivacy], names: Collection[str], head: Collection[str]
    ) -> None:
        self.privacies, self.groups = list(privacies), groups_of(names, head)
        settings = {repr(privacy.bounds) for privacy in privacies}
        if len(settings) != 1:
            raise ValueError("clients of a cohort have the same bounds")

    def most_rows(self, stacks: Mapping[str, Tensor], at_once: int) -> int:
        """Rows of one pass, of ``at_once`` that may run at a time."""
        each = sum(stack[0].numel() * stack.element_size() for stack in stacks.values())
        return max(1, MOST_BYTES // max(1, each * at_once))

    def sums(self, gradients: Mapping[str, Tensor], owners: Tensor, clients: int) -> Tensors:
        """Each client's sum of its rows' bounded gradients, (clients, ...)."""
        return clipped_row_sums(gradients, owners, clients, self.groups, self.privacies[0].bounds)

    def release(self, sums: Mapping[str, Tensor], step: int, clients: int) -> None:
        """Add each client's noise of a step to its sums, (clients, ...), and divide by the rows of a batch on
        average, in place.
        """
        for client, privacy in enumerate(self.privacies[:clients]):
            own = {name: stack[client] for name, stack in sums.items()}
            for name, noise in privacy.noise(step, own, self.groups).items():
                own[name].add_(noise.to(own[name])).div_(privacy.mechanism.expected)
