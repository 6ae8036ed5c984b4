"""Grids of runs: cells, learning-rate search, results and tables; also method comparison."""
