"""BitFit: only the bias vectors of the model are trained and sent."""
