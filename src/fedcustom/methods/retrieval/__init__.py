"""Retrieval-augmented generation."""
