"""A method that fails in a comparison, with whatever error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcustom.methods.lora.method import Lora
from fedcustom.recipe.recipe import load_recipe, to_toml


def test_a_method_that_fails_does_not_stop_the_others(
    tmp_path: Path, command: Any, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with an error that is a fault of the program; its traceback is kept."""

    def broken(*_: Any) -> None:
        raise AttributeError("'Wrapper' object has no attribute 'config'")

    plain = Lora.attach
    monkeypatch.setattr(Lora, "attach", broken)
    recipe, out = tmp_path / "recipe.toml", tmp_path / "runs"
    recipe.write_text(to_toml(load_recipe({**small, "rounds": {"count": 1}})))
    asked = ("compare", recipe, "--methods", "lora,bitfit", "--no-probe", "--out", out)
    done = command(*asked)
    assert done.code == 2
    assert "AttributeError: 'Wrapper' object has no attribute 'config' (traceback: " in done.error
    assert len(list(out.rglob("summary.json"))) == 1
    (trace,) = out.rglob("*.error.txt")
    assert "Traceback" in trace.read_text()
    monkeypatch.setattr(Lora, "attach", plain)
    assert command(*asked).code == 0
    assert len(list(out.rglob("summary.json"))) == 2
    assert not trace.exists()
