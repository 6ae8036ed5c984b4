"""Soft prompts: learnt vectors in front of the embedded input."""
