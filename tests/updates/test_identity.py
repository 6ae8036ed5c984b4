"""Callers' transforms are a part of a run: which they are, what passes them by, and resuming with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcustom
from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import RecipeError, RunError
from fedcustom.core.files import read_json
from fedcustom.core.tensors import Tensors, equal, norm, scale
from fedcustom.federated.build import check_transforms
from fedcustom.federated.callbacks import Callback
from fedcustom.methods import Update, WeightTuning
from fedcustom.methods.distillation.method import Distillation
from fedcustom.methods.prompt_engineering.black_box import BlackBox
from fedcustom.methods.prompt_engineering.in_context import InContext
from fedcustom.methods.prompt_engineering.selection import Selection
from fedcustom.methods.protocol import AggregateContext, TransformsUpdates
from fedcustom.methods.retrieval.method import Retrieval
from fedcustom.recipe.recipe import load_recipe
from fedcustom.updates.identity import identity_of, in_words
from fedcustom.updates.transform import ClientContext, UpdateTransform
from helpers.methods import make
from helpers.runs import tensors_of


class Clip(UpdateTransform):
    """Clips a client's delta."""

    name = "clip"

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self._clipped = 0

    def on_client(self, update: Update, context: ClientContext) -> Update:
        self._clipped += 1
        return replace(update, tensors=scale(update.tensors, min(1.0, self.bound / norm(update.tensors))))


class Noise(UpdateTransform):
    """Adds the same noise to the cohort's delta in each run."""

    name = "noise"

    def __init__(self, deviation: float, seed: int = 0) -> None:
        self.deviation, self.seed = deviation, seed

    def on_aggregate(self, delta: Tensors, context: AggregateContext) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed + context.round_number)
        return {n: t + self.deviation * torch.randn(t.shape, generator=generator) for n, t in delta.items()}


class Nothing(UpdateTransform):
    """The defaults."""


class Stop(Callback):
    """Ends a run after a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        if row["round"] == self.number:
            raise Stopped


class Stopped(Exception):
    """The run was to end here."""


PLAIN = {"training.fit_head": False, "training.logit_adjustment": 0, "rounds.checkpoint_every": 1}


# --- which transform it is ---


class Level(Enum):
    LOW = "low"


@dataclass
class Schedule:
    start: float
    steps: tuple[int, ...]


def test_settings_are_public_attributes() -> None:
    assert identity_of(Clip(1.5)) == {"class": "Clip", "name": "clip", "settings": {"bound": 1.5}}
    assert in_words([identity_of(Clip(1.5)), identity_of(Noise(0.1))]) == (
        "Clip(bound=1.5), Noise(deviation=0.1, seed=0)"
    )
    assert in_words([]) == "none"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, None),
        (True, True),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (float("inf"), "inf"),
        (Level.LOW, "low"),
        (Path("a/b"), "a/b"),
        ({"b": (1, 2)}, {"b": [1, 2]}),
        ({"y", "x"}, ["x", "y"]),
        (Schedule(0.1, (1, 2)), {"start": 0.1, "steps": [1, 2]}),
        (AggregationSettings(rule="median"), AggregationSettings(rule="median").model_dump(mode="json")),
    ],
)
def test_values_that_can_be_written_down(value: Any, said: Any) -> None:
    one = Clip(1.0)
    one.bound = value
    assert identity_of(one)["settings"] == {"bound": said}


@pytest.mark.parametrize("value", [torch.ones(1), np.ones(2), len, [{"a": object()}], Schedule])
def test_values_that_cannot_are_refused(value: Any) -> None:
    """What cannot be compared would be let pass."""
    one = Clip(1.0)
    one.bound = value
    with pytest.raises(
        RecipeError, match=r"transform 'clip': its bound.* cannot be written down.*underscore"
    ):
        identity_of(one)


def test_other_places_for_settings() -> None:
    """A dataclass, slots, a class's own values, those of classes above it, and what it says itself."""

    @dataclass
    class Data(UpdateTransform):
        bound: float = 2.0

    class Slots(UpdateTransform):
        __slots__ = ("bound", "unset")

        def __init__(self) -> None:
            self.bound = 3.0

    class Above(UpdateTransform):
        bound = 4.0
        handler = len

    class Below(Above):
        other = "x"

    class Says(Clip):
        def identity(self) -> Mapping[str, object]:
            return {"epsilon": 8}

    assert identity_of(Data())["settings"] == {"bound": 2.0}
    assert identity_of(Slots())["settings"] == {"bound": 3.0}
    assert identity_of(Below())["settings"] == {"bound": 4.0, "other": "x"}
    assert identity_of(Says(1.0))["settings"] == {"epsilon": 8}


# --- resuming ---


def test_a_run_goes_on_with_its_own_transforms(small: dict[str, Any], tmp_path: Path) -> None:
    """With others, in another order or without them it does not, be it finished or not."""
    recipe = load_recipe(small, {**PLAIN, "rounds.count": 3})
    own = [Clip(0.05), Noise(1e-3)]
    whole = fedcustom.run(recipe, out=tmp_path / "whole", transforms=own)
    with pytest.raises(Stopped):
        fedcustom.run(recipe, out=tmp_path / "run", transforms=own, callbacks=[Stop(2)])
    others: dict[str, list[UpdateTransform]] = {
        r"Clip\(bound=0.05\), Noise.* there, none here": [],
        r"there, Clip\(bound=0.5\), Noise": [Clip(0.5), Noise(1e-3)],
        r"there, Clip\(bound=0.05\), Noise\(deviation=0.002": [Clip(0.05), Noise(2e-3)],
        r"there, Noise\(deviation=0.001, seed=0\), Clip": [Noise(1e-3), Clip(0.05)],
    }
    for directory in ("run", "whole"):
        for message, wrong in others.items():
            with pytest.raises(RunError, match=rf"other transforms of updates \(.*{message}"):
                fedcustom.run(recipe, out=tmp_path / directory, resume=True, transforms=wrong)
    again = fedcustom.run(recipe, out=tmp_path / "run", resume=True, transforms=own)
    assert equal(tensors_of(again.directory), tensors_of(whole.directory))
    fedcustom.run(recipe, out=tmp_path / "whole", transforms=[Clip(0.05), Noise(1e-3)])  # finished: opened
    assert read_json(tmp_path / "whole" / "transforms.json") == [identity_of(one) for one in own]


def test_a_run_without_transforms_stays_one(small: dict[str, Any], tmp_path: Path) -> None:
    """Compression and attacks are keys of the recipe, and are compared as such; callbacks change nothing."""
    recipe = load_recipe(small, PLAIN)
    with pytest.raises(Stopped):
        fedcustom.run(recipe, out=tmp_path / "run", callbacks=[Stop(1)])
    with pytest.raises(RunError, match=r"none there, Clip\(bound=1.0\) here"):
        fedcustom.run(recipe, out=tmp_path / "run", resume=True, transforms=[Clip(1.0)])
    for changed in ({"compression.kind": "int8"}, {"attack.kind": "sign_flip"}):
        with pytest.raises(RunError, match=rf"another recipe's run \({next(iter(changed))} = 'none' there"):
            fedcustom.run(recipe, changed, out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "transforms.json").exists()
    fedcustom.run(recipe, out=tmp_path / "run", resume=True)


# --- what passes a transform by ---


def test_a_round_that_fits_the_head_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    """Noise that its sums pass by would protect nobody."""
    for one in (Clip(1.0), Noise(1.0)):
        message = r"would not act on all of this run: training\.fit_head_rounds = \[1\].*fit_head = false"
        with pytest.raises(RecipeError, match=message):
            fedcustom.run(small, {"training.fit_head_rounds": [1]}, out=tmp_path / "run", transforms=[one])
    assert not (tmp_path / "run").exists()


def test_rules_of_a_method_and_other_methods_are_refused(tiny: dict[str, str], small: dict[str, Any]) -> None:
    recipe = load_recipe(small)
    stacked, averaged = (make(tiny["bert"], "lora", rank=2, variant=v) for v in ("flora", "fedit"))
    check_transforms([Clip(1.0), Noise(1.0)], recipe, averaged)
    check_transforms([Clip(1.0)], recipe, stacked)  # each client's delta is whole
    with pytest.raises(RecipeError, match=r"transform 'noise': .*lora variant flora: has a rule of its own"):
        check_transforms([Clip(1.0), Noise(1.0)], recipe, stacked)

    class Other:
        """A method that trains no tensors."""

    for one in (Clip(1.0), Noise(1.0)):
        with pytest.raises(RecipeError, match=r"method\.name = .*other things than changes of trained"):
            check_transforms([one], recipe, Other())  # type: ignore[arg-type]
        one.may_be_skipped = True
        check_transforms([one], recipe, Other())  # type: ignore[arg-type]
        check_transforms([one], recipe, stacked)
    check_transforms([Nothing()], recipe, Other())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [BlackBox, Distillation, InContext, Retrieval, Selection])
def test_methods_that_send_other_things_let_no_transform_act(kind: type) -> None:
    assert not issubclass(kind, TransformsUpdates)
    assert issubclass(WeightTuning, TransformsUpdates)
