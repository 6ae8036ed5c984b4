"""Trackers that follow a run: TensorBoard, MLflow, Weights & Biases. None can stop or hold up the run."""
