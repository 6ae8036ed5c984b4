"""Base models (hub id, folder or built-in): loading, pooling, forward passes, inference."""
