"""How a task reaches clients and how their updates come back."""
