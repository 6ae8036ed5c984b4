"""Quality of predictions: pure functions of predictions and references."""
