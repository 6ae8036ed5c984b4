"""The table of packages in docs/architecture.md agrees with the packages' docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_table_is_up_to_date() -> None:
    """If this fails, run ``python scripts/architecture.py``."""
    command = [sys.executable, str(ROOT / "scripts" / "architecture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
