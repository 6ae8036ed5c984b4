"""Prompt engineering: prompts found by forward passes alone."""
