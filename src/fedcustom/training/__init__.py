"""Local optimisation at one client: optimisers, schedules, FedProx, logit adjustment."""
