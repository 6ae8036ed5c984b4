"""Aggregation rules: pure functions on named tensors."""
