"""Transforms of a client's update on its way to the server: compression and simulated attacks."""
