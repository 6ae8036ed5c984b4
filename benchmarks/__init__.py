"""How fast this project is, and against whom: ``make bench`` (docs/benchmarks.md)."""
