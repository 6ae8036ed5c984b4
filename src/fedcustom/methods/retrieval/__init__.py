"""Retrieval-augmented generation over documents that stay with their clients."""

from .method import Retrieval
from .settings import RetrievalSettings

__all__ = ["Retrieval", "RetrievalSettings"]
