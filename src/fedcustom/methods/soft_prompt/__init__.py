"""Soft prompt: learnt vectors in front of the embedded input."""
