"""Rules for the slots of prefix memories, against sums that are written out slot by slot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcustom.aggregation.prefix_memory import (
    Reading,
    Slots,
    WeightedSlots,
    cluster_readers,
    compress_slots,
    match_memory,
    matched_slots_mean,
    probes,
    stack_slots,
)
from fedcustom.core.errors import UpdateError

seeds = st.integers(0, 2**32 - 1)
forms = st.tuples(st.sampled_from([1, 2]), st.booleans())
"""The parts of a reader (two: gated), and whether its last number is a bias."""
checked = settings(max_examples=25, deadline=None)

GROUPS, IN, OUT = 2, 4, 3
SILU = Reading(torch.nn.functional.silu, 0.5)


def random_slots(generator: np.random.Generator, count: int, parts: int = 1) -> Slots:
    readers = generator.normal(size=(GROUPS, count, parts, IN))
    return Slots(torch.from_numpy(readers), torch.from_numpy(generator.normal(size=(GROUPS, count, OUT))))


def weights_of(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.uniform(0.05, 5, count)


def weighted(clients: list[Slots], weights: np.ndarray) -> list[WeightedSlots]:
    return [(slots, float(weight)) for slots, weight in zip(clients, weights, strict=True)]


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def written_out(slots: Slots, inputs: Tensor, act: Callable[[float], float] = silu) -> np.ndarray:
    """o(x), slot by slot, of the network that :data:`SILU` reads."""
    readers, writers, rows = slots.readers.numpy(), slots.writers.numpy(), inputs.numpy()
    result = np.zeros((len(readers), len(rows), writers.shape[-1]))
    for group, row, slot in itertools.product(range(len(readers)), range(len(rows)), range(readers.shape[1])):
        strength = act(0.5 * float(readers[group, slot, 0] @ rows[row]))
        if readers.shape[2] == 2:
            strength *= float(readers[group, slot, 1] @ rows[row])
        result[group, row] += strength * writers[group, slot]
    return result


def mean_of_functions(clients: list[Slots], weights: np.ndarray, inputs: Tensor) -> np.ndarray:
    found: np.ndarray = np.average([written_out(s, inputs) for s in clients], axis=0, weights=weights)
    return found


def shuffled(slots: Slots, generator: np.random.Generator) -> Slots:
    """The slots with each group in an order of its own."""
    orders = [generator.permutation(slots.readers.shape[1]) for _ in range(GROUPS)]
    return Slots(*(torch.stack([h[g, o] for g, o in enumerate(orders)]) for h in slots))  # type: ignore[arg-type]


def in_order(slots: Slots) -> np.ndarray:
    """Readers and writers side by side, in the order of their first number."""
    rows = torch.cat([slots.readers.flatten(2), slots.writers], -1).double().numpy()
    return np.stack([group[group[:, 0].argsort()] for group in rows])


# --- what slots write, and their stack ---


@checked
@given(seeds, forms, st.integers(1, 5))
def test_outputs_are_the_sum_written_out(seed: int, form: tuple[int, bool], count: int) -> None:
    parts, biased = form
    slots = random_slots(np.random.default_rng(seed), count, parts)
    inputs = probes(6, IN, biased=biased, seed=1)
    np.testing.assert_allclose(SILU.outputs(slots, inputs), written_out(slots, inputs), atol=1e-12)


def test_probes_are_standard_normal_and_the_same_every_time() -> None:
    inputs = probes(20_000, 3, biased=True)
    assert torch.equal(inputs, probes(20_000, 3, biased=True))
    assert not torch.equal(inputs, probes(20_000, 3, biased=True, seed=1))
    assert torch.equal(inputs[:, 2], torch.ones(20_000, dtype=torch.float64))
    np.testing.assert_allclose(np.cov(inputs[:, :2].numpy().T), np.eye(2), atol=0.05)
    np.testing.assert_allclose(inputs[:, :2].mean(0), 0, atol=0.05)
    one, other = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 1.0]]).double()
    gap = ((inputs[:, :2] @ (one - other).T) ** 2).mean()
    assert float(gap) == pytest.approx(float(((one - other) ** 2).sum()), rel=0.05)


@checked
@given(seeds, forms, st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_stacking_is_the_weighted_mean_of_functions(
    seed: int, form: tuple[int, bool], counts: list[int], single: bool
) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    clients = [random_slots(generator, count, parts) for count in counts]
    weights = weights_of(generator, len(counts))
    inputs = probes(5, IN, biased=biased, seed=seed % 1000)
    expected = mean_of_functions(clients, weights, inputs)
    if single:
        clients = [Slots(s.readers.float(), s.writers.float()) for s in clients]
    stacked = stack_slots(weighted(clients, weights))
    assert stacked.readers.shape == (GROUPS, sum(counts), parts, IN)
    assert stacked.readers.dtype == stacked.writers.dtype == clients[0].writers.dtype
    found = SILU.outputs(stacked.double(), inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 if single else 1e-12)


@checked
@given(seeds, forms, st.integers(1, 4))
def test_means_of_writers_and_of_linear_memories_are_means_of_functions(
    seed: int, form: tuple[int, bool], clients: int
) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    first = random_slots(generator, 3, parts)  # whose readers all clients have
    held = [Slots(first.readers, random_slots(generator, 3).writers) for _ in range(clients)]
    weights = weights_of(generator, clients)
    share = torch.from_numpy(weights / weights.sum())
    merged = Slots(first.readers, torch.einsum("k,kgso->gso", share, torch.stack([s.writers for s in held])))
    inputs = probes(7, IN, biased=biased)
    expected = mean_of_functions(held, weights, inputs)
    np.testing.assert_allclose(SILU.outputs(merged, inputs), expected, rtol=0, atol=1e-6)

    matrices = torch.from_numpy(generator.normal(size=(clients, IN, OUT)))
    unit = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    mean = np.average([unit @ matrix for matrix in matrices], axis=0, weights=weights)
    np.testing.assert_allclose(unit @ torch.einsum("k,kio->io", share, matrices), mean, rtol=0, atol=1e-6)


# --- back to a set number ---


@checked
@given(seeds, forms, st.integers(1, 4), st.integers(1, 6))
def test_permuted_clients_come_back_exactly(
    seed: int, form: tuple[int, bool], clients: int, count: int
) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    client = random_slots(generator, count, parts)
    copies = [shuffled(client, generator) for _ in range(clients)]
    stacked = stack_slots(weighted(copies, weights_of(generator, clients)))
    inputs = probes(64, IN, biased=biased)
    for merged in (
        cluster_readers(stacked, random_slots(generator, count, parts)),
        compress_slots(stacked, random_slots(generator, count, parts), SILU, inputs),
    ):
        np.testing.assert_allclose(in_order(merged), in_order(client), rtol=0, atol=1e-9)


@checked
@given(seeds, forms)
def test_tight_clusters_are_mean_readers_and_sums_of_writers(seed: int, form: tuple[int, bool]) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    centres = generator.normal(size=(1, 3, parts, IN)) * 10
    members = generator.permutation([0, 0, 0, 1, 1, 2, 2, 2, 2])
    readers = centres[:, members] + 1e-5 * generator.normal(size=(1, 9, parts, IN))
    writers = generator.normal(size=(1, 9, OUT))
    start = Slots(torch.from_numpy(centres[:, [2, 0, 1]] + 0.1), torch.zeros(1, 3, OUT).double())
    stacked = Slots(torch.from_numpy(readers), torch.from_numpy(writers))
    merged = cluster_readers(stacked, start)
    mass = (writers[0] ** 2).sum(-1)
    for place, cluster in enumerate([2, 0, 1]):  # in the start's order
        mine = members == cluster
        mean = np.average(readers[0, mine], axis=0, weights=mass[mine])
        np.testing.assert_allclose(merged.readers[0, place], mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(merged.writers[0, place], writers[0, mine].sum(0), rtol=0, atol=1e-12)
    inputs = probes(20, IN, biased=biased)
    np.testing.assert_allclose(
        SILU.outputs(merged, inputs), written_out(stacked, inputs), rtol=0, atol=1e-2 if parts == 2 else 1e-3
    )


@checked
@given(seeds, st.integers(1, 3), st.integers(0, 3))
def test_places_without_a_cluster_keep_the_starts_reader_and_write_nothing(
    seed: int, distinct: int, more: int
) -> None:
    generator = np.random.default_rng(seed)
    client = random_slots(generator, distinct)
    stacked = stack_slots([(client, 1.0), (shuffled(client, generator), 3.0)])
    start = random_slots(generator, distinct + more)
    inputs = probes(64, IN, biased=False)
    merged = compress_slots(stacked, start, SILU, inputs)
    kept = (merged.readers == start.readers).all(-1).all(-1)
    assert kept.sum(1).tolist() == [more] * GROUPS
    np.testing.assert_allclose(merged.writers[kept], 0, atol=1e-6)
    np.testing.assert_allclose(SILU.outputs(merged, inputs), written_out(client, inputs), atol=1e-9)
    silent = Slots(stacked.readers, torch.zeros_like(stacked.writers))  # as before the first values are sent
    merged = compress_slots(silent, start, SILU, inputs)
    assert not merged.writers.any()
    assert torch.isfinite(merged.readers).all()


@checked
@given(seeds, forms, st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 4))
def test_the_refit_is_the_least_squares_solution_and_no_worse_than_clusters(
    seed: int, form: tuple[int, bool], counts: list[int], count: int
) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    clients = [random_slots(generator, number, parts) for number in counts]
    weights = weights_of(generator, len(counts))
    stacked, start = stack_slots(weighted(clients, weights)), random_slots(generator, count, parts)
    inputs = probes(80, IN, biased=biased)
    clusters, merged = cluster_readers(stacked, start), compress_slots(stacked, start, SILU, inputs)
    torch.testing.assert_close(merged.readers, clusters.readers)
    target = mean_of_functions(clients, weights, inputs)
    for group in range(GROUPS):
        ones = torch.eye(count, dtype=torch.float64)[None].expand(GROUPS, -1, -1)
        strengths = written_out(Slots(merged.readers, ones), inputs)[group]
        best, _, rank, values = np.linalg.lstsq(strengths, target[group], rcond=None)
        reached = np.linalg.norm(strengths @ merged.writers[group].numpy() - target[group])
        clustered = np.linalg.norm(strengths @ clusters.writers[group].numpy() - target[group])
        assert reached <= clustered * (1 + 1e-12) + 1e-12
        if rank == count and values[-1] > 2e-4 * values[0]:
            np.testing.assert_allclose(merged.writers[group], best, rtol=1e-6, atol=1e-8)


def test_readers_that_are_nearly_equal_get_no_huge_writers() -> None:
    generator = np.random.default_rng(0)
    stacked = random_slots(generator, 12)
    start = random_slots(generator, 2)
    readers = stacked.readers.clone()
    readers[:, 6:] = readers[:, :6] + 1e-7  # pairs; clusters are pairs or larger
    merged = compress_slots(Slots(readers, stacked.writers), start, SILU, probes(200, IN, biased=False))
    assert float(merged.writers.abs().max()) < 50
    twins = Slots(readers[:, [0, 6, 1, 7]], stacked.writers[:, :4])
    merged = compress_slots(twins, random_slots(generator, 4), SILU, probes(200, IN, biased=False))
    assert float(merged.writers.abs().max()) < 50


@pytest.mark.parametrize("parts", [1, 2])
def test_compressed_stacks_are_nearer_to_the_mean_function_than_the_plain_mean(parts: int) -> None:
    """On inputs that were not fitted: docs/prefix_rules.md has the table."""
    errors: dict[str, list[float]] = {"mean": [], "clusters": [], "refitted": []}
    for seed in range(5):
        generator = np.random.default_rng(seed)
        start = random_slots(generator, 6, parts)
        clients = []
        for _ in range(5):
            moved = random_slots(generator, 6, parts)
            clients.append(Slots(start.readers + 0.5 * moved.readers, moved.writers))
        weights = weights_of(generator, 5)
        share = torch.from_numpy(weights / weights.sum())
        stacked = stack_slots(weighted(clients, weights))
        mean = Slots(
            *(torch.einsum("k,k...->...", share, torch.stack(h)) for h in zip(*clients, strict=True))
        )
        new = probes(300, IN, biased=False, seed=9)
        target = mean_of_functions(clients, weights, new)
        found = {
            "mean": mean,
            "clusters": cluster_readers(stacked, start),
            "refitted": compress_slots(stacked, start, SILU, probes(512, IN, biased=False)),
        }
        for name, slots in found.items():
            missed = SILU.outputs(slots, new).numpy() - target
            errors[name].append(float(np.linalg.norm(missed) / np.linalg.norm(target)))
    mean_error, clusters, refitted = (float(np.mean(errors[name])) for name in errors)
    assert refitted < 0.8 * clusters
    assert refitted < 0.8 * mean_error


# --- matching ---


def slot_cost(slots: Slots, reference: Slots, group: int) -> np.ndarray:
    """c(i, j) of slot i and the reference's slot j, written out."""
    cost = np.zeros((slots.readers.shape[1], reference.readers.shape[1]))
    for own, goal in zip(slots, reference, strict=True):
        x, y = own[group].flatten(1).numpy(), goal[group].flatten(1).numpy()
        scale = ((y - y.mean(0)) ** 2).sum(1).mean()
        cost += ((x[:, None] - y[None]) ** 2).sum(-1) / scale
    return cost


@checked
@given(seeds, st.sampled_from([1, 2]), st.integers(2, 5))
def test_matching_is_the_best_of_all_permutations(seed: int, parts: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    slots, reference = random_slots(generator, count, parts), random_slots(generator, count, parts)
    far = Slots(reference.readers * 20 + 100, reference.writers)  # other units, and far from zero
    matched, permutation = match_memory(Slots(slots.readers * 20 + 100, slots.writers), far)
    for group in range(GROUPS):
        order = permutation[group].tolist()
        assert sorted(order) == list(range(count))
        assert torch.equal(matched.writers[group], slots.writers[group, order])
        cost = slot_cost(Slots(slots.readers * 20 + 100, slots.writers), far, group)
        found = sum(cost[i, j] for j, i in enumerate(order))
        trials = itertools.permutations(range(count))
        assert found == pytest.approx(min(sum(cost[i, j] for j, i in enumerate(t)) for t in trials))
    assert torch.equal(match_memory(slots, reference)[1], permutation)


def test_matching_leaves_out_what_is_all_the_same() -> None:
    generator = np.random.default_rng(1)
    slots = random_slots(generator, 5)
    silent = Slots(slots.readers.flip(1), torch.zeros_like(slots.writers))  # the state before the first round
    assert torch.equal(match_memory(slots, silent)[0].readers, slots.readers.flip(1))
    same = Slots(torch.ones_like(slots.readers), torch.zeros_like(slots.writers))
    assert torch.equal(match_memory(slots, same)[1], torch.arange(5).expand(GROUPS, 5))


@checked
@given(seeds, forms)
def test_the_matched_mean_undoes_permutations_that_functions_do_not_see(
    seed: int, form: tuple[int, bool]
) -> None:
    generator = np.random.default_rng(seed)
    parts, biased = form
    reference = random_slots(generator, 5, parts)
    aligned = []
    for _ in range(4):
        moved = random_slots(generator, 5, parts)
        aligned.append(Slots(*(r + 0.001 * m for r, m in zip(reference, moved, strict=True))))
    weights = weights_of(generator, 4)
    orders = [shuffled(slots, generator) for slots in aligned]
    inputs = probes(4, IN, biased=biased)
    for one, other in zip(aligned, orders, strict=True):
        np.testing.assert_allclose(written_out(one, inputs), written_out(other, inputs), atol=1e-10)
    mean = matched_slots_mean(weighted(orders, weights), reference)
    for found, halves in zip(mean, zip(*aligned, strict=True), strict=True):
        expected = np.average([half.numpy() for half in halves], axis=0, weights=weights)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_the_matched_mean_consumes_clients_one_by_one() -> None:
    reference = random_slots(np.random.default_rng(2), 3)
    alive: list[int] = []

    def stream() -> Iterator[WeightedSlots]:
        for number in range(3):
            alive.append(number)
            yield Slots(reference.readers.clone(), reference.writers.clone()), 1.0

    mean = matched_slots_mean(stream(), reference)
    torch.testing.assert_close(mean.readers, reference.readers)
    assert alive == [0, 1, 2]


def test_what_does_not_fit_is_refused() -> None:
    generator = np.random.default_rng(3)
    slots = random_slots(generator, 3)
    bad = Slots(slots.readers, slots.writers.clone())
    bad.writers[0, 0, 0] = math.nan
    for clients, message in [
        ([], "no prefix to merge"),
        ([(slots, 0.0)], "weight 0.0 is not a positive number"),
        ([(slots, 1.0), (slots, math.inf)], "weight inf is not a positive number"),
        ([(slots, 1.0), (bad, 1.0)], "client 1 holds numbers that are not finite"),
        ([(slots, 1.0), (random_slots(generator, 3, 2), 1.0)], "client 1: slots of"),
        ([(Slots(slots.readers[:, :2], slots.writers), 1.0)], "client 0: readers must be"),
    ]:
        with pytest.raises(UpdateError, match=message):
            stack_slots(clients)
    with pytest.raises(UpdateError, match="client 0: slots of"):
        matched_slots_mean([(random_slots(generator, 4), 1.0)], slots)
    with pytest.raises(UpdateError, match="no slots to merge"):
        matched_slots_mean([], slots)
    with pytest.raises(UpdateError, match="the start: slots of"):
        compress_slots(slots, random_slots(generator, 2, 2), SILU, probes(8, IN, biased=False))
