"""Bottleneck adapters in the feed-forward networks; only the adapters are trained and sent."""
