"""Full fine-tuning: every weight of the model is trained and sent."""

from .method import Full, FullSettings

__all__ = ["Full", "FullSettings"]
