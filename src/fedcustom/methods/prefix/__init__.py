"""Prefix-tuning: learnt keys and values in front of those of the input, in every layer."""

from .method import Prefix, PrefixSettings

__all__ = ["Prefix", "PrefixSettings"]
