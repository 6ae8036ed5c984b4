"""Changes with noise of their clients: sensitivity by brute force, and what the server reads of a sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedcustom.core.errors import UpdateError
from fedcustom.core.tensors import Tensors
from fedcustom.methods import Answer, Client, Update, WeightTuning, Work
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.methods.tuning.noised_sums import NoisedSums
from fedcustom.privacy.client_mechanism import client_mechanism
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.secure_sum.terms import Terms
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.privacy.sum_noise import SCALE
from fedcustom.transport.secure import SUM, ChangeVector
from helpers.methods import SETTINGS, examples_for, make

FORMS = {"own.a": torch.zeros(3, 5), "own.b": torch.zeros(7), "head.w": torch.zeros(2, 3)}
HEAD = frozenset({"head.w"})
KEY = NoiseKey.seeded(5)


def sums(z: float = 1.0, clients: int = 4, asked: int | None = None, **more: Any) -> NoisedSums:
    section = PrivacySettings.model_validate(
        {"unit": "client", "noise": "sum", "noise_multiplier": z, "delta": 1e-3} | more
    )
    found = client_mechanism(
        section, clients=clients, clients_per_round=asked or clients, factors=[1.0] * 4, terms=Terms()
    )
    return NoisedSums(found, 2, HEAD, lambda number: 1 / number, KEY.of, 0)


def change(seed: int, size: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(form.shape, generator=generator) * size for name, form in FORMS.items()}


def vector(noised: NoisedSums, given: Tensors, client: str = "a", number: int = 1) -> np.ndarray:
    return np.concatenate(list(noised.encode(given, number, client, 3)))


def by_group(difference: np.ndarray) -> dict[str, int]:
    """Squared norms of integers, exactly; the names in their order are head.w, own.a and own.b."""
    numbers = difference.astype(np.uint32).view(np.int32).astype(object)
    return {"head": int((numbers[:6] ** 2).sum()), "own": int((numbers[6:] ** 2).sum())}


@pytest.mark.parametrize("clip", ["unit", 0.5])
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6, float("inf")])
def test_a_client_moves_a_group_of_the_sum_by_the_scale_at_most(clip: Any, size: float) -> None:
    """Against zeros in its place, with the same noise: whatever it sends, and however long."""
    noised = sums(clip=clip, clip_head=clip)
    nothing = vector(noised, {name: torch.zeros_like(form) for name, form in FORMS.items()})
    for seed in range(20):
        given = change(seed, size)
        if seed == 1:
            given = {name: torch.full_like(form, size) for name, form in FORMS.items()}
        if seed == 2:
            given = {name: torch.zeros_like(form) for name, form in FORMS.items()}
            given["own.b"][3] = -size
        moved = by_group(vector(noised, given) - nothing)
        assert max(moved.values()) <= SCALE**2
        if clip == "unit" and size == 1.0 and seed != 2:
            assert min(moved.values()) > 0.99 * SCALE**2, "the bound is used up"


def test_noise_has_the_variance_of_a_part_and_is_the_clients_own() -> None:
    noised = sums(z=2.0)
    zeros = {"own.a": torch.zeros(40_000), "head.w": torch.zeros(10)}
    one, other, later = (
        vector(noised, zeros, client, number).view(np.int32).astype(float)
        for client, number in (("a", 1), ("b", 1), ("a", 2))
    )
    assert one.var() == pytest.approx(
        2 * (2.0 * SCALE) ** 2 / 2, rel=0.03
    )  # three have to stay, one colludes
    assert one[:10].std() > 0, "the head too"
    for pair in ((one, other), (one, later)):
        assert abs(np.corrcoef(*pair)[0, 1]) < 0.03
    assert (vector(noised, zeros, "a", 1).view(np.int32) == one).all(), (
        "a round that is repeated has the same"
    )


def test_the_server_divides_by_the_clients_of_a_round_on_average() -> None:
    """Whoever answers: of four clients in two groups two are expected, and one came."""
    noised = sums(z=1e-4, clients=8, asked=4, clip=0.5, clip_head="unit")
    given = change(3, 1e3)
    found = noised.decode(vector(noised, given, number=2), FORMS, 2)
    for names, bound in ((["own.a", "own.b"], 0.5), (["head.w"], 1.0)):
        length = torch.stack([given[name].norm() for name in names]).norm()
        for name in names:  # in round 2 the schedule's factor is a half
            expected = given[name] / length * bound / 2 / 4
            torch.testing.assert_close(found[name], expected, atol=2e-4, rtol=0)


def test_masks_depend_on_how_much_noise_there_is() -> None:
    task = b"t" * 32
    others = [
        sums(),
        sums(z=1.1),
        replace(sums(), groups=1),
        sums(randomness="seeded"),
        replace(sums(), mechanism=replace(sums().mechanism, terms=Terms(colluding=0))),
        replace(sums(), mechanism=replace(sums().mechanism, terms=Terms(threshold=4))),
    ]
    assert len({one.bound_to(task) for one in others}) == len(others)
    assert sums().bound_to(task) == replace(sums(), keys=None).bound_to(task)
    assert sums().bound_to(b"u" * 32) != sums().bound_to(task)
    with pytest.raises(UpdateError, match=r"privacy.noise = 'sum': this party has no key"):
        list(replace(sums(), keys=None).encode(change(0), 1, "a", 3))


def test_a_round_through_the_verbs_of_a_method(tiny: dict[str, str]) -> None:
    noised, examples = sums(z=1e-4), examples_for("classification")
    found = make(tiny["bert"], "prefix", training={"optimizer": "sgd"}, **SETTINGS["prefix"])
    context = replace(found.context, privacy=noised.mechanism.settings, sums_only=True, rounds=4)
    for side in (found.server.parts, found.client.parts):
        side.context = context
    found.context = context
    assert isinstance(found, WeightTuning)
    noised = NoisedSums.of(found, noised.mechanism, KEY.of)
    assert (noised.groups, noised.head) == (2, found.trainable.head)
    coding = ChangeVector(16.0, 4, None, 0, losses=False, noised=noised)
    state = found.initialise()
    from fedcustom.data.examples import ClientData

    clients = {f"c{i}": Client(f"c{i}", ClientData(f"c{i}", examples[2 * i : 2 * i + 2])) for i in range(4)}
    tasks = found.configure(state, 1, {name: Work(epochs=1) for name in clients})
    updates = found.execute_together([(tasks[name], client) for name, client in clients.items()])
    forms = found.change_forms(tasks["c0"])
    total: Any = 0
    for name, update in zip(clients, updates, strict=True):
        assert isinstance(update, TrainUpdate)
        total = total + coding.encode(update, forms, 1, name, 3)
    reply = coding.opened(tasks["c0"], total, forms, tuple(clients))
    assert isinstance(reply.update, Update)
    answer = Answer(SUM, tasks["c0"], reply.update, summed=tuple(clients))
    after = found.aggregate(state, [answer]).state
    for names in (found.trainable.head, state.tensors.keys() - found.trainable.head):
        expected: Any = dict.fromkeys(names, 0)
        for update in updates:
            assert isinstance(update, TrainUpdate)
            length = torch.stack([update.tensors[name].norm() for name in names]).norm()
            expected = {name: expected[name] + update.tensors[name] / length / 4 for name in names}
        for name in names:
            torch.testing.assert_close(
                after.tensors[name] - state.tensors[name], expected[name], atol=1e-3, rtol=0
            )
    single = Answer("c0", tasks["c0"], updates[0])  # type: ignore[arg-type]
    for wrong in ([single], [answer, answer]):
        with pytest.raises(RuntimeError, match=r"privacy.noise = 'sum'"):
            found.aggregate(state, wrong)
