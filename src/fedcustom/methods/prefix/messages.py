"""Message of prefix-tuning with ``layers_sent``: a part of the prefix's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from ..messages import Whole
from ..tuning.messages import TrainUpdate

Layers = Annotated[list[Whole], Field(max_length=10_000, fail_fast=True)]


@dataclass(frozen=True, kw_only=True)
class PrefixUpdate(TrainUpdate):
    """A trained change that holds only these ``layers`` of the prefix, in this order."""

    layers: Layers
