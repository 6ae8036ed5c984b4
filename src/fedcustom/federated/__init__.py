"""One federated run: the FedAvg loop, its parties, its schedule, its evaluation and its run directory."""
