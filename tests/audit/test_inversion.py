"""Tokens and texts are read from the span of a change where there is one, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedcustom.audit.attack import CannotAttack, Deadline, OutOfTime, Target
from fedcustom.audit.auxiliary import AuxiliaryTexts, f1, likenesses, weights_by_likeness
from fedcustom.audit.candidates import likeness
from fedcustom.audit.inversion import Inversion
from fedcustom.audit.layer_inputs import LayerInputs
from fedcustom.audit.leading import leading_directions, nearness
from fedcustom.audit.results import NotRun
from fedcustom.audit.span import Span
from fedcustom.privacy.example_mechanism import ExamplePrivacy, Releases
from fedcustom.privacy.settings import PrivacySettings
from helpers.audit import LATER, by_measure, seen, target

SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0}


def found(run: Target, number: int = 2, names: Sequence[str] = ("c00", "c01", "c02")) -> Any:
    assert Inversion().inapplicable(run) is None
    return by_measure(Inversion().attack(run, seen(run, number, list(names)), LATER))


# --- the span ---


def test_a_span_holds_what_it_is_made_of() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 64, generator=draw)
    errors = torch.randn(100, 20, generator=draw)
    before = torch.randn(100, 64, generator=draw)
    after = before + 1e-3 * errors @ inputs
    span = Span.of(after - before, before)
    assert span is not None
    assert span.visible
    assert len(span.basis) == 20
    assert span.holds(3 * inputs).all()
    assert span.holds(inputs[:1] + inputs[1:2]).all()
    assert not span.holds(torch.randn(1000, 64, generator=draw)).any()
    near = inputs + 0.02 * torch.randn(20, 64, generator=draw)
    assert not span.holds(near).any()


def test_a_span_that_says_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(100, 64, generator=draw)
    assert Span.of(torch.zeros(100, 64), before) is None
    assert Span.of(torch.zeros(0, 1), torch.zeros(0, 1)) is None
    noise = Span.of(torch.randn(100, 64, generator=draw), before)
    assert noise is not None
    assert noise.full
    assert not noise.visible
    few = Span.of(torch.randn(8, 64, generator=draw), before[:8])
    assert few is not None
    assert few.limited
    assert not few.visible


# --- inputs of layers ---


def test_which_matrices_take_the_inputs(tiny: dict[str, str]) -> None:
    ends = {
        "bert": {"query.weight", "key.weight", "value.weight"},
        "llama": {"q_proj.weight", "k_proj.weight", "v_proj.weight"},
        "gpt2": {"c_attn.weight"},
    }
    for kind, names in ends.items():
        run = target(tiny[kind], "full", "classification" if kind == "bert" else "generation")
        for number in (0, 1):
            layer = LayerInputs.of(run.knowledge.parts.trainable, number)
            assert layer is not None
            assert {".".join(name.split(".")[-2:]) for name in layer.matrices} == names
            assert all(f".{number}." in name for name in layer.matrices)
            assert set(layer.matrices.values()) == {kind != "gpt2"}
        assert LayerInputs.of(run.knowledge.parts.trainable, 2) is None
    lora = LayerInputs.of(target(tiny["bert"], "lora").knowledge.parts.trainable, 0)
    assert lora is not None
    assert all("lora_A" in name for name in lora.matrices)
    for method, kind in (("prefix", "bert"), ("bitfit", "bert")):
        assert LayerInputs.of(target(tiny[kind], method).knowledge.parts.trainable, 0) is None
    both = target(tiny["bart"], "full", "generation")
    assert LayerInputs.of(both.knowledge.parts.trainable, 0) is None


@pytest.mark.parametrize("number", [0, 1])
def test_inputs_are_what_the_gradient_is_made_of(tiny: dict[str, str], number: int) -> None:
    """Of a text alone, the gradient of a matrix has no part outside of its inputs."""
    run = target(tiny["bert"], "full")
    layer, example = LayerInputs.of(run.knowledge.parts.trainable, number), run.texts[0]
    assert layer is not None
    gradient = layer.rows(run.knowledge.gradient(example, list(layer.matrices)))
    states = layer.of_texts(run.knowledge.texts(example))[0].double()
    if number == 0:
        for place, token in enumerate(run.knowledge.texts(example)[0]):
            alone = layer.of_tokens([token], place + 1)[0, place]
            assert torch.allclose(alone.double(), states[place], atol=1e-6)
    basis = torch.linalg.qr(states.T).Q
    outside = gradient - gradient @ basis @ basis.T
    assert float(outside.norm()) < 1e-5 * float(gradient.norm())


# --- the attack ---


@pytest.mark.parametrize("texts", [1, 2])
def test_every_token_of_a_gradient_step_is_found(tiny: dict[str, str], texts: int) -> None:
    """Of two texts a few pairs more are in the span: embeddings are sums of token and position, so that
    tokens a and b at one place and b at another have a at the other place among their combinations.
    """
    run = target(tiny["bert"], "full", per_client=texts, training=SGD)
    each = found(run)
    assert each["client's update: clients whose change has a span"].success == 1.0
    assert each["client's update: tokens with their positions: recall"].success == 1.0
    precision = each["client's update: tokens with their positions: precision"].success
    assert precision == 1.0 if texts == 1 else precision > 0.7
    rebuilt = each["client's update: texts rebuilt exactly"]
    assert (rebuilt.success, rebuilt.meaning.partition(",")[0]) == (1.0, f"{3 * texts} of {3 * texts} texts")


def test_a_causal_model_is_read_from_left_to_right(tiny: dict[str, str]) -> None:
    """A token is the same at every place to the tiny Llama, so that its second layer decides on the order."""
    for kind, what in (("gpt2", "tokens with their positions"), ("llama", "tokens")):
        run = target(tiny[kind], "full", "generation", per_client=1, training=SGD)
        each = found(run)
        assert each[f"client's update: {what}: recall"].success == 1.0
        assert each["client's update: texts rebuilt exactly"].success == 1.0


@pytest.mark.parametrize("rank", [12, 4])
def test_lora_shows_no_more_than_its_rank(tiny: dict[str, str], rank: int) -> None:
    """And nothing in round 1, when the second factor is zero and the first does not move."""
    training = {**SGD, "learning_rate": 30.0}
    run = target(tiny["gpt2"], "lora", "generation", per_client=1, rank=rank, training=training)
    names = ["c00", "c01", "c02"]
    first = seen(run, 1, names)
    span = "client's update: clients whose change has a span"
    each = by_measure(Inversion().attack(run, first, LATER))
    assert "of 3 the matrices did not move" in each[span].meaning
    each = by_measure(Inversion().attack(run, seen(run, 2, names, first.after), LATER))
    if rank == 4:
        assert "of 3 there are as many directions as rows" in each[span].meaning
        assert each[span].success == 0.0
    else:
        assert each["client's update: tokens with their positions: recall"].success == 1.0
        assert each["client's update: texts rebuilt exactly"].success == 1.0


def test_what_has_no_span(tiny: dict[str, str]) -> None:
    """Adam's division by each number's own size leaves none."""
    run = target(tiny["bert"], "full", training={"optimizer": "adamw"})
    each = found(run)
    span = each["client's update: clients whose change has a span"]
    assert (span.success, span.trials) == (0.0, 3)
    assert "of 3 Adam has divided the gradient" in span.meaning
    assert not [name for name in each if "tokens" in name and "auxiliary" not in name]


def test_signs_lie_near_the_inputs() -> None:
    """Of a sum of ten products, all inputs are nearer to the leading directions of its signs than others."""
    draw = torch.Generator().manual_seed(0)
    inputs, others = torch.randn(10, 64, generator=draw), torch.randn(500, 64, generator=draw)
    rows = torch.randn(200, 10, generator=draw) @ inputs
    directions = leading_directions(1e-3 * rows.sign(), 10)
    assert directions.shape == (10, 64)
    assert torch.allclose(directions @ directions.T, torch.eye(10), atol=1e-5)
    near = nearness(torch.stack([inputs, inputs.flip(0)], dim=1), directions)
    assert float(near.min()) > float(nearness(others[:, None], directions).max())
    assert leading_directions(rows, 1000).shape == (32, 64)
    assert leading_directions(rows[:3], 10).shape == (3, 64)


def test_noise_has_every_direction(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "full", per_client=1, training=SGD)
    view = seen(run, 2, ["c00", "c01"])
    noise = [
        replace(m.update, tensors={n: torch.randn(t.shape) for n, t in m.update.tensors.items()})
        for m in view.received
    ]
    received = [replace(m, update=update) for m, update in zip(view.received, noise, strict=True)]
    each = by_measure(Inversion().attack(run, replace(view, received=received), LATER))
    span = each["client's update: clients whose change has a span"]
    assert span.success == 0.0
    assert "of 2 the change has every direction" in span.meaning


@pytest.mark.parametrize("method", ["full", "lora"])
def test_adam_hides_no_tokens(tiny: dict[str, str], method: str) -> None:
    """The table of embeddings, which is the output layer too, tells nothing here."""
    run = target(tiny["llama"], method, "generation", per_client=1, training={"optimizer": "adamw"})
    names = list(run.data.clients)
    view = seen(run, 1, names)
    each = by_measure(Inversion().attack(run, seen(run, 2, names, view.after), LATER))
    assert each["client's update: clients whose change has a span"].success == 0.0
    tokens = each["client's update: token F1, by leading directions"]
    assert tokens.chance is not None
    assert tokens.low is not None
    assert tokens.low > tokens.chance
    noise = {n: torch.randn(t.shape) for n, t in view.received[0].update.tensors.items()}
    received = [replace(m, update=replace(m.update, tensors=noise)) for m in view.received]
    each = by_measure(Inversion().attack(run, replace(view, received=received), LATER))
    assert each["client's update: token F1, by leading directions"].success < tokens.success - 0.1


def test_the_state_of_a_client_alone_is_its_change(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "full", per_client=1, training=SGD)
    each = found(run, names=("c00",))
    for view in ("client's update", "state difference"):
        assert each[f"{view}: texts rebuilt exactly"].success == 1.0
    view = replace(seen(run, 2, ["c00", "c01"]), received=[])
    with pytest.raises(CannotAttack, match="single client"):
        Inversion().attack(run, view, LATER)


def test_inversion_stops_in_time(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "full", per_client=1, training=SGD)
    with pytest.raises(OutOfTime):
        Inversion().attack(run, seen(run, 2, ["c00"]), Deadline(0.0))


# --- auxiliary texts ---


AUXILIARY = "client's update: token F1, by auxiliary texts"


@pytest.mark.parametrize("method", ["lora", "prefix", "bitfit"])
def test_auxiliary_texts_tell_of_tokens(tiny: dict[str, str], method: str) -> None:
    """A client of one text, whose topic's word is one of a few."""
    run = target(tiny["bert"], method, per_client=1, held=200, training=SGD)
    each = found(run, names=list(run.data.clients))[AUXILIARY]
    assert each.chance is not None
    assert each.success > each.chance + 0.02
    assert each.trials == 20


def test_likeness_is_that_of_candidates() -> None:
    draw = torch.Generator().manual_seed(0)
    change = {
        "a": torch.randn(3, 4, generator=draw),
        "b": torch.randn(5, generator=draw),
        "c": torch.zeros(2),
    }
    gradient = {name: torch.randn(t.shape, generator=draw) for name, t in change.items()}
    assert likenesses([change], gradient) == pytest.approx([likeness(change, gradient)], abs=1e-6)
    assert likenesses([{}], gradient) == [0.0]


def test_weights_of_texts() -> None:
    """One standard deviation is a factor of e^3 within a label; labels keep their shares but for that."""
    labels = np.array([0, 0, 1, 1])
    texts = AuxiliaryTexts([], np.eye(4), np.arange(10, 14), labels)
    texts = replace(texts, examples=[None] * 4)  # type: ignore[list-item]
    assert texts.shares([0, 0, 0, 1]) == pytest.approx([0.375, 0.375, 0.125, 0.125])
    assert texts.shares([7]) == pytest.approx([0.25] * 4)  # of which there is no text
    scores = np.array([1.0, -1.0, 5.0, 5.0])
    found = weights_by_likeness(texts, [0, 1], scores)
    assert found[0] / found[1] == pytest.approx(np.exp(3 * 2 / scores.std()))
    assert found[2] == pytest.approx(found[3])
    assert texts.guess(found, 1) == {10}
    assert weights_by_likeness(texts, [0], np.zeros(4)) == pytest.approx([0.5, 0.5, 0, 0])


def test_f1() -> None:
    assert f1(frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})) == pytest.approx(2 * 2 / 7)
    assert f1(frozenset(), frozenset()) == 0


def test_too_few_auxiliary_texts_are_said(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "prefix", held=49)
    left = Inversion().attack(run, seen(run, 2, ["c00"]), LATER)
    assert [type(each) for each in left] == [NotRun, NotRun]
    assert [each.reason.partition(":")[0] for each in left if isinstance(each, NotRun)] == [
        "span check", "auxiliary texts",
    ]  # fmt: skip


def test_hidden_rows_tell_nothing(tiny: dict[str, str]) -> None:
    """Prefix memory whose clients noise each step, at an epsilon of 1."""
    privacy = PrivacySettings(unit="example", epsilon=1.0, delta=1e-3, randomness="seeded")
    steps = {f"c{n:02}": Releases(2) for n in range(20)}
    run = target(
        tiny["bert"], "prefix", per_client=4, held=200, training=SGD, length=8, kind="memory",
        row_privacy=ExamplePrivacy(privacy, 4, 0, steps),
    )  # fmt: skip
    each = found(run, names=list(run.data.clients))[AUXILIARY]
    assert each.chance is not None
    assert each.success < each.chance + 0.03
