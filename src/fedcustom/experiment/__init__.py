"""A grid of runs in one file: its settings, its cells, learning rates, results and tables."""
