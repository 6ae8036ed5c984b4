"""The base model as it is, for others to beat: zero-shot, or with training examples in its context."""
