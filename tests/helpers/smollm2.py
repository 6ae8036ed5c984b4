"""The mark of tests that need the model file of ``builtin:smollm2``."""

from __future__ import annotations

import pytest

from fedcustom.core.errors import ModelError
from fedcustom.models.smollm2 import check_present


def _missing() -> str:
    try:
        check_present()
    except ModelError as error:
        return str(error)
    return ""


needs_smollm2 = pytest.mark.skipif(bool(_missing()), reason=_missing())
"""Skips a test where the model is not installed, and says with which command it is."""
