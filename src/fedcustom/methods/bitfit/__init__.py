"""BitFit: the bias vectors of the model are trained and sent, and nothing else of it."""
