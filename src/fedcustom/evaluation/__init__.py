"""Metrics of classification, generation and retrieval; calibration; statistics over clients and seeds."""
