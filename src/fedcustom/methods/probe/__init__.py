"""The sceptic's baseline: a linear head on the frozen model."""
