"""Transforms of updates: their order, what each of them sees, and where one is refused."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import fedcustom
from fedcustom.aggregation.settings import AggregationSettings, Rule
from fedcustom.core.errors import RecipeError, WireError
from fedcustom.core.tensors import Tensors, combine, norm, scale
from fedcustom.federated.run import run_recipe
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.federated.simulation import Federation, simulate
from fedcustom.methods import Memory, State, Task, Update
from fedcustom.methods.messages import RoundTask
from fedcustom.methods.protocol import AggregateContext
from fedcustom.methods.tuning.messages import (
    MESSAGES,
    FitHeadTask,
    HeadGradientTask,
    ScaleHeadTask,
    TrainTask,
    TrainUpdate,
)
from fedcustom.recipe.recipe import load_recipe
from fedcustom.simulation.settings import AttackSettings
from fedcustom.transport.channel import Channel, Packed, update_length
from fedcustom.transport.messages import read_update, values_of
from fedcustom.transport.protocol import Reply, check_visible
from fedcustom.updates.attack import Falsification, LittleIsEnough, simulated_attack
from fedcustom.updates.compression import compress
from fedcustom.updates.encode import RESIDUAL, Compression
from fedcustom.updates.pipeline import on_client, on_server, update_transforms
from fedcustom.updates.settings import CompressionSettings
from fedcustom.updates.transform import (
    ClientContext,
    EncodedUpdate,
    JointTransform,
    ServerTransform,
    UpdateContext,
    UpdateTransform,
)
from helpers.runs import rows_of

HEAD_TASKS = (FitHeadTask, ScaleHeadTask, HeadGradientTask)

INT8 = CompressionSettings(kind="int8", error_feedback=True)


class Clip(UpdateTransform):
    """Clips a client's delta, as a user would write it; notes what it was given."""

    name = "clip"
    is_linear = False

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.seen: list[tuple[str, int, Tensors]] = []
        self.combined: list[tuple[AggregateContext, Tensors]] = []

    def on_client(self, update: Update, context: ClientContext) -> Update:
        self.seen.append((context.client, context.round_number, update.tensors))
        factor = min(1.0, self.bound / norm(update.tensors))
        return replace(update, tensors=scale(update.tensors, factor))

    def on_aggregate(self, delta: Tensors, context: AggregateContext) -> Tensors:
        self.combined.append((context, delta))
        return scale(delta, 0.5)


def random_change(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(5, 9, generator=generator) for name in ("a", "b")}


def context_of(change: Tensors, client: str = "c", kind: type[RoundTask] = TrainTask) -> ClientContext:
    return ClientContext(client, kind(dict(change), round_number=3), Memory())


def trained(change: Tensors) -> TrainUpdate:
    return TrainUpdate(change, 2.0, loss=1.0, examples=3, steps=1)


# --- one update ---


def test_a_clients_transform_acts_before_compression() -> None:
    """Clipping sees the delta of the method; its result is compressed, with feedback on that."""
    change, clip = random_change(), Clip(1.0)
    transforms = update_transforms(INT8, own=[clip])
    context = context_of(change)
    sent = on_client(transforms, trained(change), context)
    ((client, number, seen),) = clip.seen
    assert (client, number) == ("c", 3)
    assert seen is change
    clipped = scale(change, 1.0 / norm(change))
    assert isinstance(sent, EncodedUpdate)
    assert sent.tensors.keys() == {"numbers", "scales"}
    by_hand = compress(clipped, INT8)
    assert all(torch.equal(by_hand[name], tensor) for name, tensor in sent.tensors.items())
    received = on_server(transforms, sent, UpdateContext("c", context.task))
    assert type(received) is TrainUpdate
    assert values_of(received) == values_of(sent) == values_of(trained(change))
    lost = combine(torch.sub, clipped, received.tensors)
    for name, tensor in lost.items():
        torch.testing.assert_close(context.memory.tensors[RESIDUAL + name], tensor)


def test_an_update_travels_as_a_message_and_back() -> None:
    change = random_change()
    (compression,) = update_transforms(INT8)
    context = context_of({**change, "c": torch.zeros(2)})
    sent = compression.on_client(trained(change), context)
    packed = Packed.of(sent)
    assert packed.layout == [0, 1]
    values = {"weight": 2.0, "loss": 1.0, "examples": 3, "steps": 1}
    assert packed.length(values) == update_length(sent)
    again = packed.update(read_update(MESSAGES, context.task, values))
    received = on_server([compression], again, UpdateContext("c", context.task))
    expected = on_server([compression], sent, context)
    assert all(torch.equal(expected.tensors[name], t) for name, t in received.tensors.items())
    assert Packed.of(Update(change)) == Packed(change)
    assert type(Packed(change).update(trained({}))) is TrainUpdate
    with pytest.raises(WireError):
        on_server([compression], Packed({"numbers": torch.zeros(3)}).update(Update()), context)


def test_exact_answers_are_neither_falsified_nor_compressed() -> None:
    """For the tasks of head fits, which :class:`Task` knows."""
    change = random_change()
    attack = Falsification(frozenset("c"), AttackSettings(kind="sign_flip", scale=2.0), 0)
    transforms = update_transforms(INT8, [attack])
    for kind in HEAD_TASKS:
        update = Update(change)
        assert on_client(transforms, update, context_of(change, kind=kind)) is update
        assert on_server(transforms, update, context_of(change, kind=kind)) is update
    assert not isinstance(on_client(transforms, Update({}), context_of(change)), EncodedUpdate)
    flipped = attack.on_client(Update(change), context_of(change))
    assert all(torch.equal(-2.0 * change[name], t) for name, t in flipped.tensors.items())
    honest = Update(change)
    assert attack.on_client(honest, context_of(change, client="d")) is honest
    exact = {kind: (kind.exact_answer, kind.exact_tensors) for kind in (TrainTask, *HEAD_TASKS)}
    assert exact == {
        TrainTask: (False, False),
        FitHeadTask: (True, False),
        ScaleHeadTask: (True, True),
        HeadGradientTask: (True, True),
    }


def test_heads_are_sent_as_they_are_and_states_compressed() -> None:
    channel = Channel(CompressionSettings(kind="int8", down=True), random_change())
    for kind in (TrainTask, *HEAD_TASKS):
        exact = kind in (ScaleHeadTask, HeadGradientTask)
        task = kind(random_change(1), round_number=1)
        packed = channel.pack_down(task)
        assert (packed.tensors is task.tensors) == exact
        received, length = channel.down(task)
        factor = {} if exact else {"learning_rate_factor": 1.0}
        assert length == packed.length({"kind": kind.kind, "round": 1, **factor})
        unpacked = channel.unpack_down(packed, kind(round_number=1))
        assert values_of(unpacked) == values_of(task)
        assert unpacked.tensors.keys() == task.tensors.keys()
        assert all(torch.equal(unpacked.tensors[name], t) for name, t in received.tensors.items())


# --- the list ---


def test_the_order_of_the_list() -> None:
    attack = simulated_attack(frozenset("c"), AttackSettings(kind="alie"), 0)
    clip = Clip(1.0)
    transforms = update_transforms(INT8, attack, [clip])
    assert [type(one) for one in transforms] == [LittleIsEnough, Clip, Compression]
    assert update_transforms(CompressionSettings()) == ()
    assert simulated_attack(frozenset(), AttackSettings(), 0) == ()
    assert isinstance(transforms[0], JointTransform)
    assert isinstance(transforms[2], ServerTransform)
    assert not isinstance(clip, JointTransform | ServerTransform)
    with pytest.raises(RecipeError, match=r"compression\.kind = 'int8': decides the bytes"):
        update_transforms(INT8, own=[Compression(INT8)])
    with pytest.raises(RecipeError, match=r"attack\.kind = 'alie': .* must be first"):
        update_transforms(INT8, own=[clip, *attack])


def test_what_transforms_say_of_themselves() -> None:
    said = {
        kind: [
            (one.needs_individual_updates, one.changes_bytes, one.is_linear)
            for one in simulated_attack(frozenset("c"), AttackSettings(kind=kind), 0)  # type: ignore[arg-type]
        ]
        for kind in ("sign_flip", "random", "alie", "label_flip", "backdoor")
    }
    linear, other, joint = (False, False, True), (False, False, False), (True, False, False)
    assert said["alie"] == [joint]
    assert said["random"] == [other]
    assert said["sign_flip"] == said["label_flip"] == said["backdoor"] == [linear]
    # Linear: of a sum it makes the sum.
    one, two = random_change(1), random_change(2)
    flip = Falsification(frozenset("c"), AttackSettings(kind="sign_flip"), 0)
    added = combine(torch.add, one, two)
    made = [flip.on_client(Update(change), context_of(change)).tensors for change in (one, two, added)]
    for name in one:
        torch.testing.assert_close(made[0][name] + made[1][name], made[2][name])


# --- where only sums are seen ---


class OnlySums:
    """A transport that shows sums."""

    def exchange_sum(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        yield from ()


class Plain:
    """A transport that shows every update."""

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        yield from ()


def test_what_needs_single_updates_is_refused_where_only_sums_are_seen() -> None:
    mean = AggregationSettings()
    check_visible(OnlySums(), update_transforms(CompressionSettings(), own=[Clip(1.0)]), mean)
    flip = simulated_attack(frozenset("c"), AttackSettings(kind="sign_flip"), 0)
    check_visible(OnlySums(), flip, mean)
    with pytest.raises(RecipeError, match=r"attack\.kind = 'alie': needs single clients' updates"):
        check_visible(OnlySums(), simulated_attack(frozenset("c"), AttackSettings(kind="alie"), 0), mean)
    with pytest.raises(RecipeError, match=r"compression\.kind = 'int8': codes cannot be added up"):
        check_visible(OnlySums(), update_transforms(INT8), mean)
    for rule in get_args(Rule):
        settings = AggregationSettings(rule=rule)
        check_visible(Plain(), update_transforms(INT8), settings)
        assert settings.needs_individual_updates == (rule != "mean")
        if rule != "mean":
            with pytest.raises(RecipeError, match=rf"aggregation\.rule = '{rule}': looks at each client's"):
                check_visible(OnlySums(), (), settings)


# --- whole runs ---


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_transforms_in_a_whole_run(small: dict[str, Any], tmp_path: Path, rule: str) -> None:
    """Every client's delta comes to the transform as it was trained, and the rule's result to its other side;
    the state follows what that returns.
    """
    overrides = {
        "aggregation.rule": rule, "compression.kind": "bfloat16", "rounds.count": 2,
        "rounds.clients_per_round": 3, "evaluation.select": "last",
        "training.logit_adjustment": 0, "training.fit_head_rounds": [],
    }  # fmt: skip
    recipe, clip = load_recipe(small, overrides), Clip(0.01)
    origin: list[Tensors] = []

    def gather(*arguments: Any) -> Federation:
        parties = simulate(*arguments)
        origin.append(dict(parties.origin.tensors))
        return parties

    run_recipe(recipe, tmp_path / "run", gather=gather, transforms=[clip])
    rows = rows_of(tmp_path / "run")[1:]
    answered = [(name, row["round"]) for row in rows for name in row["answered"]]
    assert sorted((name, number) for name, number, _ in clip.seen) == sorted(answered)
    assert all(norm(tensors) > 0.01 for _, _, tensors in clip.seen)
    assert [context.round_number for context, _ in clip.combined] == [1, 2]
    assert [sorted(context.clients) for context, _ in clip.combined] == [sorted(r["answered"]) for r in rows]
    # What arrived: clipped, then rounded to bfloat16.
    first = [t for _, number, t in clip.seen if number == 1]
    arrived = [scale(t, 0.01 / norm(t)) for t in first]
    arrived = [{name: t.bfloat16().float() for name, t in tensors.items()} for tensors in arrived]
    stacked = {name: torch.stack([tensors[name] for tensors in arrived]) for name in first[0]}
    delta = clip.combined[0][1]
    if rule == "median":
        for name, tensor in stacked.items():
            torch.testing.assert_close(delta[name], tensor.median(dim=0).values)
    else:
        assert norm(delta) <= 0.01 * 1.01
    after, (first_delta, second_delta) = tensors_after(tmp_path / "run", 2), [d for _, d in clip.combined]
    for name, tensor in after.items():
        expected = origin[0][name] + 0.5 * (first_delta[name] + second_delta[name])
        torch.testing.assert_close(tensor, expected)


def test_a_transform_that_changes_nothing_changes_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    """Beside an attack, compression with feedback and a compressed downlink: bytes and tensors."""
    overrides = {
        "attack.kind": "random", "attack.fraction": 0.5, "compression.kind": "int8", "rounds.count": 2,
        "compression.error_feedback": True, "compression.down": True, "evaluation.select": "last",
    }  # fmt: skip
    recipe = load_recipe(small, overrides)
    fedcustom.run(recipe, out=tmp_path / "plain")
    run_recipe(recipe, tmp_path / "run", transforms=[Identity()])
    ours, theirs = (tensors_after(tmp_path / name, 2) for name in ("run", "plain"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    sums = [[row["bytes_up"] for row in rows_of(tmp_path / name)[1:]] for name in ("run", "plain")]
    assert sums[0] == sums[1]


class Identity(UpdateTransform):
    """The defaults."""


def test_a_failing_transform_leaves_its_client_out(small: dict[str, Any], tmp_path: Path) -> None:
    class Refuse(UpdateTransform):
        may_be_skipped = True

        def on_client(self, update: Update, context: ClientContext) -> Update:
            if context.round_number == 2:
                raise ValueError("no budget is left")
            return update

    recipe = load_recipe(small, {"rounds.count": 2, "rounds.min_clients": 1})
    with pytest.raises(fedcustom.FedcustomError, match="no budget is left"):
        run_recipe(recipe, tmp_path / "run", transforms=[Refuse()])


def test_baselines_have_no_transforms(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(small, {"baseline": "local"})
    with pytest.raises(RecipeError, match="baseline = 'local': transforms of updates need 'federated'"):
        run_recipe(recipe, tmp_path / "run", transforms=[Identity()])


def tensors_after(run: Path, number: int) -> Tensors:
    state: State = Checkpoints(run / "checkpoints").load(number).state
    return dict(state.tensors)


def test_what_is_no_delta_travels_as_it_is() -> None:
    """A caller's transform need not know of answers without tensors, or of those that must be exact."""
    clip = Clip(1.0)
    empty = Update({}, 2.0)
    assert on_client([clip], empty, context_of({})) is empty
    assert not clip.seen
