"""Federated rounds with a user's own ``transformers.Trainer``: its model, data, collator and loss."""
