"""Retrieval-augmented generation over documents that stay with their clients."""
