"""Conditions that only a simulation has: label noise, poisoned data, hostile, absent and late clients."""
