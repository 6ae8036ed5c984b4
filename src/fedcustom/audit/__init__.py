"""Attacks on a run of our own: what an update, a state, a sum or the released model says of the data."""
