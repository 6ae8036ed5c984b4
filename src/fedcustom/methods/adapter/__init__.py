"""Bottleneck adapters: extra hidden units in every feed-forward network; only these are trained and sent."""

from .method import Adapter, AdapterSettings

__all__ = ["Adapter", "AdapterSettings"]
