"""Runs whose rows stay on disk: the same rounds and the same model, also when they go on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.core.errors import RunError
from fedcustom.data import row_file
from helpers.runs import rows_of, tensors_of, without_seconds


class Stop(fedcustom.Callback):
    def on_round_end(self, row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("partition", ["quantity", "natural"])
def test_run_is_the_same_and_goes_on(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str
) -> None:
    source = tmp_path / "rows"
    shutil.copytree(small["data"]["source"], source)
    text = (source / "test.jsonl").read_text()
    lines = [line.replace('"site"', '"place"') for line in text.splitlines()]  # nobody's test rows
    (source / "test.jsonl").write_text("\n".join(lines) + "\n")
    natural = {"partition": "natural", "column": "site"}
    clients = natural if partition == "natural" else {"partition": "quantity", "count": 12}
    recipe = {
        **small,
        "data": {**small["data"], "source": str(source), "development": "test"},
        "clients": {**clients, "test_fraction": 0.0},
        "rounds": {"count": 2, "clients_per_round": 3},
    }
    fedcustom.run(recipe, out=tmp_path / "memory", check_export=False)
    monkeypatch.setattr(row_file, "LARGE_FILE", 1)
    disk = tmp_path / "disk"
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(recipe, out=disk, callbacks=[Stop()])
    fedcustom.run(recipe, out=disk, resume=True, check_export=False)
    assert [without_seconds(r) for r in rows_of(disk)] == [
        without_seconds(r) for r in rows_of(tmp_path / "memory")
    ]
    expected, found = tensors_of(tmp_path / "memory"), tensors_of(disk)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    shutil.rmtree(disk)
    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(recipe, out=disk, callbacks=[Stop()])
    rows = (source / "train.jsonl").read_text().splitlines()
    (source / "train.jsonl").write_text("\n".join([rows[1], rows[0], *rows[2:]]) + "\n")
    with pytest.raises(RunError, match="rows of 1 of 1 clients differ"):
        fedcustom.run(recipe, out=disk, resume=True)
