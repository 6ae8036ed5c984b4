"""Bottleneck adapters: extra hidden units in every feed-forward network; only these are trained and sent."""
