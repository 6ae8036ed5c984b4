"""Prompts found by forward passes only: selection, in-context learning, black-box soft prompts."""

from .method import prompt_engineering
from .settings import PromptEngineeringSettings

__all__ = ["PromptEngineeringSettings", "prompt_engineering"]
