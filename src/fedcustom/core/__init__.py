"""Errors, settings, tensors, files, environment and memory: what every other package builds on."""
