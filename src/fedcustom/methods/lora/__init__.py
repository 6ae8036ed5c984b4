"""LoRA and its federated variants."""

from .method import Lora
from .settings import LoraSettings

__all__ = ["Lora", "LoraSettings"]
