"""What only a simulation has: hostile clients, and clients that drop out, do less or come late."""
