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
from helpers.secure_sites import SecureSites, failing, last, rows_of
from helpers.site_recipes import blocks, owners_recipe

STEPS = 4
"""Exchanges of the logistic regression."""


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A probe with four clients of unlike size, whose labels are the same."""
    return owners_recipe(
        tiny["bert"],
        tmp_path / "rows",
        blocks(30, 40, 24, 36),
        method={"name": "probe"},
        training={"cohort_width": 1, "fit_head_steps": STEPS},
        evaluation={"batch_size": 32, "select": "last", "untuned": False},
        secure_sum={"on": True},
    )


def head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "classifier" in name}


def test_a_deployed_fit_is_equal_to_the_simulation_to_the_last_bit(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    sites = SecureSites(tmp_path / "sites", recipe, trick=failing("o2", "agree", exchange=3 + STEPS))
    sites.run(tmp_path / "deployed")
    assert equal(last(tmp_path / "simulated"), last(tmp_path / "deployed"))
    (one,), (other,) = rows_of(tmp_path / "simulated"), rows_of(tmp_path / "deployed")
    for key in ("answered", "left_out", "method"):
        assert one.get(key) == other.get(key), key
    assert one["answered"] == ["o0", "o1", "o2", "o3"]
    assert "of 4 clients, of which sums alone are seen" in one["method"]["head"]
    told = sites.unmasked("o0")
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


class Told(fedcustom.Callback):
    """Keeps what a fit of the head was estimated to send."""

    fitting = 0

    def on_outline(self, outline: Any) -> None:
        self.fitting = outline.fitting


def test_it_is_near_the_fit_of_a_run_without_secure_sums(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["training"]["fit_head_least_texts"] = 1
    told = Told()
    fedcustom.run(recipe, out=str(tmp_path / "summed"), callbacks=[told])
    (row,) = rows_of(tmp_path / "summed")
    sent = row["bytes_up_total"] + row["bytes_down_total"]
    assert told.fitting == pytest.approx(sent, rel=3e-3), "digits of numbers apart"
    fedcustom.run({**recipe, "secure_sum": None}, out=str(tmp_path / "open"))
    for name, tensor in head(last(tmp_path / "open")).items():
        summed = head(last(tmp_path / "summed"))[name]
        torch.testing.assert_close(summed, tensor, rtol=0, atol=2e-4 * float(tensor.norm()))


def test_a_site_that_is_lost_between_the_sums(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Before the vectors are summed the round comes to nothing. Later, the head stays that of the sums: the
    discriminant, at its temperature.
    """
    recipe["training"] |= {"fit_head_least_texts": 1}
    sites = SecureSites(tmp_path / "sites", recipe, trick=failing("o1", "keys", exchange=4))
    sites.run(tmp_path / "later")
    (row,) = rows_of(tmp_path / "later")
    assert "not all clients went on; kept what was fitted before" in row["method"]["head"]
    assert list(sites.unmasked("o0")) == ["1.1", "1.2", "1.3"]
    assert any("is not opened" in reason for reason in row["left_out"].values())
    steps = {**recipe, "training": {**recipe["training"], "fit_head_steps": 0}}
    fedcustom.run(steps, out=str(tmp_path / "simulated"))
    simulated, deployed = head(last(tmp_path / "simulated")), head(last(tmp_path / "later"))
    scale = {name: float(deployed[name].norm() / tensor.norm()) for name, tensor in simulated.items()}
    for name, tensor in simulated.items():
        torch.testing.assert_close(deployed[name], scale[name] * tensor, rtol=1e-5, atol=1e-7)
    first = SecureSites(tmp_path / "others", recipe, trick=failing("o1", "keys", exchange=2))
    first.run(tmp_path / "first")
    (row,) = rows_of(tmp_path / "first")
    assert "the clients' vectors were not summed" in row["refused"]
    assert list(first.unmasked("o0")) == ["1.1"]


@pytest.mark.parametrize(
    ("policy", "withheld"),
    [({"least_label_examples": 60}, 0), ({"least_label_examples_alone": 60}, 130)],
)
def test_a_sites_own_minimum(
    recipe: dict[str, Any], tmp_path: Path, policy: dict[str, Any], withheld: int
) -> None:
    """Of all sites' texts of a label, or of its own: either way there are too few here."""
    sites = SecureSites(tmp_path / "sites", recipe, policy=policy)
    sites.run(tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["method"]["head"].startswith("not fitted: labels that fewer than 3 clients have, or of fewer")
    assert list(sites.unmasked("o0")) == ["1.1"]
    files = [sites.folder / name / "fedcustom" / "audit.jsonl" for name in sites.names]
    events = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    told = [event for event in events if event["event"] == "withheld"]
    assert bool(told) == bool(withheld)
