"""Bottleneck adapters in the feed-forward networks; only the adapters are trained and sent."""

from .method import Adapter, AdapterSettings

__all__ = ["Adapter", "AdapterSettings"]
