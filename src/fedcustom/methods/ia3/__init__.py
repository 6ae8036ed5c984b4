"""(IA)^3: learnt vectors rescale keys, values and the hidden units of the feed-forward networks."""

from .method import Ia3, Ia3Settings

__all__ = ["Ia3", "Ia3Settings"]
