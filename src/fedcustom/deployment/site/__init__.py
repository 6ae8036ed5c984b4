"""A data owner in a deployed run: its data, memory, policy and audit log."""
