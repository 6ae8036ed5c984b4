"""Knowledge distillation: clients send predictions on public texts; no weights travel."""

from .method import Distillation
from .settings import DistillationSettings

__all__ = ["Distillation", "DistillationSettings"]
