"""LN-tuning: only the normalisation layers of the model are trained and sent."""
