"""Prompts found by forward passes only: selection, in-context learning, black-box soft prompts."""
