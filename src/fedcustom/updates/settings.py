"""The recipe's section on compression."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.settings import Settings


class CompressionSettings(Settings):
    """How changes are compressed on their way between server and clients."""

    kind: Literal["none", "float16", "bfloat16", "int8", "int4", "top_k"] = Field(
        "none",
        description="How a change travels: as it is, in half precision (float16, bfloat16), quantised in "
        "blocks (int8: 25.4 % of float32's bytes, int4: 13.3 %), or only its largest numbers (top_k)",
    )
    block: int | None = Field(
        None,
        ge=2,
        le=65536,
        description="Numbers that share one scale (int8, int4); unset: 128 for int8, 64 for int4",
    )
    fraction: float = Field(
        0.05, gt=0, le=1, description="Share of a change's numbers that is kept, over all tensors (top_k)"
    )
    error_feedback: bool = Field(
        False,
        description="Each client remembers what compression lost, and adds it to its next change (as many "
        "private numbers as the change has)",
    )
    down: bool = Field(
        False,
        description="Compress the server's messages too: what it sends is the change relative to the state "
        "that every client can compute from the seed",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for key in ("error_feedback", "down"):
            if getattr(self, key) and self.kind == "none":
                raise ValueError(f"{key} = true: nothing is compressed; set kind")
        if self.down and self.kind == "top_k":
            raise ValueError("down = true: not with kind = 'top_k', which would leave out most of the state")
        return self
