"""Privacy: what hides a single client's contribution from the server, so far secure sums."""
