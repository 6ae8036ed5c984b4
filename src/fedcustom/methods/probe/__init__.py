"""Linear probe, the baseline of every classifier: a linear head on the frozen model."""
