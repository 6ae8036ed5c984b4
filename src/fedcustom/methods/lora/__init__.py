"""Low-rank adaptation: each adapted matrix W becomes W + (alpha / r) B A, and only A and B are trained and
sent.
"""

from .method import Lora, LoraSettings

__all__ = ["Lora", "LoraSettings"]
