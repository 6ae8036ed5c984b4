"""BitFit: only the bias vectors of the model are trained and sent."""

from .method import BitFit, BitFitSettings

__all__ = ["BitFit", "BitFitSettings"]
