"""Prefix-tuning on keys and values, with rules for merging prefixes (mean, matching, stacking)."""

from .method import Prefix
from .settings import PrefixSettings

__all__ = ["Prefix", "PrefixSettings"]
