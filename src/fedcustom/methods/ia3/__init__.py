"""(IA)^3: learnt vectors rescale keys, values and the hidden units of the feed-forward networks."""
