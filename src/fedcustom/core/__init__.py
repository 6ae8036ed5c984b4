"""Errors, settings, named tensors, seeds, atomic files, environment and memory; shared by all packages."""
