"""Soft prompts: learnt vectors in front of the embedded input."""

from .method import SoftPrompt, SoftPromptSettings

__all__ = ["SoftPrompt", "SoftPromptSettings"]
