"""Prefix-tuning on keys and values, and the rules by which clients' prefixes are merged."""

from .method import Prefix
from .settings import PrefixSettings

__all__ = ["Prefix", "PrefixSettings"]
