"""The precision that ``model.dtype = "auto"`` chooses: measured once, and kept throughout a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom.data.examples import LearningTask
from fedcustom.federated.base_model import begun_in
from fedcustom.federated.replay import copy_of_run
from fedcustom.models import precision
from fedcustom.models.load import load_base
from fedcustom.models.precision import Precision, faster
from fedcustom.models.settings import ModelSettings
from helpers.precision import claim

TEXTS = LearningTask("generation")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDCUSTOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "precision"


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
def test_a_step_is_measured_in_each_precision(tiny: dict[str, str], kind: str) -> None:
    task = LearningTask("classification", ("a", "b")) if kind == "bert" else TEXTS
    base = load_base(ModelSettings(base=tiny[kind], dtype="auto"), task, 0)
    assert set(base.measured) == {"float32", "bfloat16"}
    assert all(seconds > 0 for seconds in base.measured.values())
    assert base.precision == faster(base.measured)
    assert all(p.grad is None and p.dtype == torch.float32 for p in base.model.parameters())
    assert not load_base(ModelSettings(base=tiny[kind]), task, 0).measured


def test_bfloat16_must_win_clearly() -> None:
    assert faster({"float32": 1.0, "bfloat16": 0.79}) == "bfloat16"
    assert faster({"float32": 1.0, "bfloat16": 0.81}) == "float32"


def test_it_is_measured_once_for_a_model_and_a_shape(
    tiny: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = claim(monkeypatch, float32=1.0, bfloat16=0.5)

    def loaded(kind: str = "gpt2", rows: int = 4, tokens: int = 16) -> Precision:
        settings = ModelSettings(base=tiny[kind], dtype="auto")
        return load_base(settings, TEXTS, 0, batch=(rows, tokens)).precision

    assert [loaded(), loaded()] == ["bfloat16"] * 2
    assert shapes == [(4, 16)]
    loaded(rows=5)
    loaded(kind="llama")
    assert shapes == [(4, 16), (5, 16), (4, 16)]
    loaded(rows=10**6)  # no more than a batch of some tokens is measured
    assert shapes[-1] == (precision.MOST_TOKENS // 16, 16)
    assert len(list(cache.iterdir())) == 4
    for file in cache.iterdir():
        file.write_text("{}")
    loaded()
    assert shapes[-1] == (4, 16)
    before = len(shapes)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    loaded()
    assert len(shapes) == before + 1


def test_a_cache_that_cannot_be_written_is_done_without(
    tiny: dict[str, str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file in the folder's place")
    shapes = claim(monkeypatch, float32=1.0, bfloat16=0.9)
    settings = ModelSettings(base=tiny["gpt2"], dtype="auto")
    assert [load_base(settings, TEXTS, 0).precision for _ in range(2)] == ["float32"] * 2
    assert len(shapes) == 2


def test_a_run_keeps_the_precision_in_which_it_was_begun(
    tiny: dict[str, str], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed where the other is faster, and to the same bits as without a break; also when it is opened."""
    recipe = {
        "model": {"base": tiny["bert"], "dtype": "auto"},
        "data": {"source": str(data_folder), "test": "test", "max_length": 24},
        "clients": {"partition": "iid", "count": 2},
        "method": {"name": "lora", "rank": 2},
        "training": {"local_steps": 2},
        "rounds": {"count": 2, "checkpoint_every": 1},
        "evaluation": {"untuned": False},
    }
    shapes = claim(monkeypatch, float32=1.0, bfloat16=0.5)
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    assert shapes == [(16, 24)]
    place = tmp_path / "run"
    begun = recipe | {"rounds": {"count": 2, "checkpoint_every": 1}}

    class Stops(fedcustom.Callback):
        def on_round_end(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcustom.run(begun, out=place, callbacks=[Stops()])
    assert begun_in(place) == "bfloat16"
    monkeypatch.setenv("FEDCUSTOM_CACHE", str(tmp_path / "another machine"))
    shapes = claim(monkeypatch, float32=0.5, bfloat16=1.0)
    run = fedcustom.run(begun, out=place, resume=True)
    assert json.loads((place / "environment.json").read_text())["precision"] == "bfloat16"
    assert (place / "predictions.jsonl").read_bytes() == (whole.directory / "predictions.jsonl").read_bytes()
    run.predict(["a cat"])
    (tmp_path / "again").mkdir()  # as an audit repeats its rounds
    again = copy_of_run(place, run.recipe, tmp_path / "again", fedcustom.Callback())
    assert again.base.precision == "bfloat16"
    assert not shapes
