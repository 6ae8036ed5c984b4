"""The fit of the head under secure sums: equal to the simulation to the last bit, near the fit of a run
without them, and what the sites send of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fedcustom
from fedcustom.core.tensors import equal
from helpers.rows import make_rows, write_jsonl
from helpers.secure_sites import SecureSites, failing, last, rows_of

STEPS = 4
"""Exchanges of the logistic regression."""


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A probe with four clients of unlike size, whose labels are the same."""
    folder = tmp_path / "rows"
    folder.mkdir()
    sizes = [30, 40, 24, 36]
    names = [name for name, size in enumerate(sizes) for _ in range(size)]
    rows = [{**row, "owner": f"o{owner}"} for row, owner in zip(make_rows(130, 0), names, strict=True)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", make_rows(20, 2))
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(folder), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "owner"},
        "method": {"name": "probe"},
        "training": {"cohort_width": 1, "fit_head_steps": STEPS},
        "evaluation": {"batch_size": 32, "select": "last", "untuned": False},
        "secure_sum": {"on": True},
    }


def lost_in(site: str, exchange: int, stage: str) -> Any:
    """A site that is lost in one stage of one exchange of round 1."""

    def trick(name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        values = message.get("values", {})
        if message["kind"] != "secure" or values.get("exchange", 1) != exchange:
            return None
        return failing(site, stage)(name, message)

    return trick


def unmasked(sites: SecureSites, name: str) -> dict[str, Any]:
    (file,) = (sites.folder / name / "fedcustom" / "secure_sums").glob("*.json")
    return dict(json.loads(file.read_text()))


def head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "classifier" in name}


def test_a_deployed_fit_is_equal_to_the_simulation_to_the_last_bit(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    sites = SecureSites(tmp_path / "sites", recipe, trick=lost_in("o2", 3 + STEPS, "agree"))
    sites.run(tmp_path / "deployed")
    assert equal(last(tmp_path / "simulated"), last(tmp_path / "deployed"))
    (one,), (other,) = rows_of(tmp_path / "simulated"), rows_of(tmp_path / "deployed")
    for key in ("answered", "left_out", "method"):
        assert one.get(key) == other.get(key), key
    assert one["answered"] == ["o0", "o1", "o2", "o3"]
    assert "of 4 clients, of which sums alone are seen" in one["method"]["head"]
    told = unmasked(sites, "o0")
    assert list(told) == [f"1.{exchange}" for exchange in range(1, 4 + STEPS)]
    assert all(entry["sites"] == ["o0", "o1", "o2", "o3"] for entry in told.values())
    # What a site sends is masked, and nothing else: no numbers of its own.
    works = [(message, said) for _, message, said in sites.seen if message["kind"] == "work"]
    assert {message["task"] for message, _ in works} == {
        "count labels", "sum vectors", "sum losses", "sum gradients",
    }  # fmt: skip
    for _, said in works:
        assert set(said["values"]) == {"message"}
        ((name, tensor),) = safetensors.torch.load_file(said["body"]).items()
        assert (name, tensor.dtype) == ("masked", torch.int64)
        high = (tensor >> 48).double()  # uniform over all 16 bits
        assert high.std() > 0.5 * 2**16 / 12**0.5


def test_it_is_near_the_fit_of_a_run_without_secure_sums(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"]["fit_head_least_texts"] = 1
    fedcustom.run(recipe, out=str(tmp_path / "summed"))
    fedcustom.run({**recipe, "secure_sum": None}, out=str(tmp_path / "open"))
    for name, tensor in head(last(tmp_path / "open")).items():
        summed = head(last(tmp_path / "summed"))[name]
        torch.testing.assert_close(summed, tensor, rtol=0, atol=2e-4 * float(tensor.norm()))
