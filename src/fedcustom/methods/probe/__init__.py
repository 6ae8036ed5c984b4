"""The sceptic's baseline: a linear head on the frozen model."""

from .method import Probe, ProbeSettings

__all__ = ["Probe", "ProbeSettings"]
