"""The verbs that weight-tuning methods share: local training, ownership, aggregation hooks, head fitting."""
