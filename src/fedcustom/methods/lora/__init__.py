"""LoRA and its federated variants (FFA, FLoRA, FedEx, FlexLoRA, HetLoRA, Fed-SB and others)."""

from .method import Lora
from .settings import LoraSettings

__all__ = ["Lora", "LoraSettings"]
