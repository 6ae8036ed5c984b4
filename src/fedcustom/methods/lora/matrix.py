"""An adapted matrix: the names under which its tensors travel, and its shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..tuning.aggregation_hooks import BASE_CHANGE

PRIVATE = "_private."
"""Part of the names of tensors of a client's own adapter."""


@dataclass(frozen=True)
class Matrix:
    """An adapted matrix: the names of its tensors, and A and B as they are initialised.

    ``a`` and ``b`` are those of the start; where a variant fixes them, they never change.
    """

    name: str
    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def a_name(self) -> str:
        """The name of A of (rank, in)."""
        return f"{self.name}.lora_A.weight"

    @property
    def b_name(self) -> str:
        """The name of B of (out, rank)."""
        return f"{self.name}.lora_B.weight"

    @property
    def r_name(self) -> str:
        """The name of R of (rank, rank), where that is what is trained."""
        return f"{self.name}.lora_R.weight"

    @property
    def private_names(self) -> tuple[str, str]:
        """The names of A and B of a client's own adapter."""
        return f"{self.name}.lora_A{PRIVATE}weight", f"{self.name}.lora_B{PRIVATE}weight"

    @property
    def base_name(self) -> str:
        """The name of the dense change of the base, (out, in)."""
        return f"{BASE_CHANGE}{self.name}.weight"
