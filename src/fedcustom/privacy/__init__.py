"""Privacy: differential privacy (clipping, noise, participation, accounting) and secure sums."""
