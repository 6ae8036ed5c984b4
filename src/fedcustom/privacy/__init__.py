"""Differential privacy: settings, clipping, noise, correlated noise, participation and accounting."""
