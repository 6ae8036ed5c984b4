"""Full fine-tuning: every weight of the model is trained and sent."""
