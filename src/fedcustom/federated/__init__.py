"""One federated run: the round loop, schedule, evaluation, callbacks, learning-rate search, run directory."""
