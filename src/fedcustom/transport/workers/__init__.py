"""Simulated clients on many resident workers: processes on Ray, each with the base model loaded once."""
