"""BitFit: the bias vectors of the model are trained and sent, and nothing else of it."""

from .method import BitFit, BitFitSettings

__all__ = ["BitFit", "BitFitSettings"]
