"""The architecture matrix: which method trains which kind of model, and how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # for the helpers
