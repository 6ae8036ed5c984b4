"""Checks of an installation and its machine, each with its remedy."""

from __future__ import annotations

from .examination import CHECKS, examine
from .finding import Finding

__all__ = ["CHECKS", "Finding", "examine"]
