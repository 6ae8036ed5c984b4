"""The architecture matrix: which method trains which kind of model, and how."""
