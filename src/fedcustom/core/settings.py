"""The base of every settings class: frozen, typed, and with a line of help on each field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """One section of a recipe. Unknown keys are refused, and values are not silently converted between
    types.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        strict=True,
        defer_build=True,  # a validator is built when it is first used, not at import
    )
