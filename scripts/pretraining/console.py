"""What the script prints."""

from __future__ import annotations

import time


def log(text: str) -> None:
    """Print a line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)
