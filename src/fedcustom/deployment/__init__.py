"""Deployment of a recipe across sites: the federation's folder, its server, and the parties of a run."""
