"""Aggregation rules and server optimisers: pure functions on named tensors."""
