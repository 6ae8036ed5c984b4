"""Customising without weights: prompts found by forward passes only."""
