"""One client's optimisation."""
