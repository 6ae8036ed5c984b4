"""The prefix rules against brute force and sums written out by hand, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcustom.aggregation.prefix import (
    WeightedPrefix,
    barycentre,
    layer_scores,
    match_slots,
    matched_mean,
    mean_of_selected,
    select_layers,
)
from fedcustom.aggregation.prefix_stacking import (
    Stacked,
    cluster_slots,
    stack_prefixes,
)
from fedcustom.core.errors import UpdateError

seeds = st.integers(0, 2**31 - 1)
checked = settings(max_examples=30, deadline=None)

# --- data and independent computations ---


def normal(generator: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(generator.normal(size=shape))


def weights_of(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.uniform(0.05, 5, count)


def attention_with_prefix(
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    slot_bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over a prefix's slots and the input's own keys, in plain products::

        softmax([q . K_prefix * scale + bias, q . K * scale + (0 or -inf by mask)]) [V_prefix; V]

    Args:
        query: (..., query heads, queries, size); its leading dimensions are those of the result.
        keys: (..., heads, tokens, size), the input's own; query head h uses head h // (query heads / heads).
            None where the prefix is all there is.
        values: Like ``keys``.
        prefix_keys: (..., heads, slots, size); leading dimensions broadcast to the query's.
        prefix_values: Like ``prefix_keys``.
        slot_bias: (..., heads, slots), one dimension less than ``prefix_keys``; or, with as many dimensions
            as ``query``, what broadcasts to (..., query heads, queries, slots).
        mask: True where a query may attend to a token; broadcasts to (..., query heads, queries, tokens). The
            slots are never masked.
        scale: What products of query and key are multiplied by; 1 / sqrt(size) if unset.

    Returns:
        (..., query heads, queries, size).
    """
    groups = query.shape[-3] // prefix_keys.shape[-3]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    slots = prefix_keys.shape[-2]

    def per_query_head(tensor: Tensor, dim: int = -3) -> Tensor:
        return tensor.repeat_interleave(groups, dim=dim)

    logits = query @ per_query_head(prefix_keys).mT * factor
    if slot_bias is not None:
        per_slot = slot_bias.dim() < prefix_keys.dim()
        logits = logits + (per_query_head(slot_bias, -2)[..., None, :] if per_slot else slot_bias)
    if keys is not None:
        own = query @ per_query_head(keys).mT * factor
        logits = torch.cat([logits, own if mask is None else own.masked_fill(~mask, -math.inf)], dim=-1)
    shares = logits.softmax(dim=-1)
    output = shares[..., :slots] @ per_query_head(prefix_values)
    return output if values is None else output + shares[..., slots:] @ per_query_head(values)


def prefix_attention(
    stacked: Stacked, queries: Tensor, keys: Tensor | None = None, values: Tensor | None = None
) -> Tensor:
    """Attention in every layer: queries (layers, batch, query heads, queries, size), own keys and values
    (layers, batch, heads, tokens, size).
    """
    prefix, bias = stacked.prefix[:, None], stacked.bias[:, None]  # an axis for the batch
    return attention_with_prefix(queries, keys, values, prefix[:, :, 0], prefix[:, :, 1], bias)


def shuffled(prefix: Tensor, generator: np.random.Generator) -> Tensor:
    """The prefix with the slots of each layer and head in an order of their own."""
    result = prefix.clone()
    for layer in range(prefix.shape[0]):
        for head in range(prefix.shape[2]):
            order = torch.from_numpy(generator.permutation(prefix.shape[3]))
            result[layer, :, head] = prefix[layer, :, head, order]
    return result


def weighted(prefixes: list[Tensor], weights: np.ndarray) -> list[WeightedPrefix]:
    return [(prefix, float(weight)) for prefix, weight in zip(prefixes, weights, strict=True)]


def numerator_and_normaliser(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, factors: np.ndarray
) -> tuple[np.ndarray, float]:
    """``sum_j f_j exp(q . k_j / sqrt(size)) v_j`` and the sum without values, for one query, by a loop."""
    numerator, normaliser = np.zeros(values.shape[1]), 0.0
    for key, value, factor in zip(keys, values, factors, strict=True):
        term = factor * math.exp(float(query @ key) / math.sqrt(len(query)))
        numerator, normaliser = numerator + term * value, normaliser + term
    return numerator, normaliser


def slot_cost(prefix: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """c(i, j) of :func:`match_slots` for one layer and head: (2, length, size) twice, by its formula."""
    length = prefix.shape[1]
    cost = np.zeros((length, length))
    for half in range(2):
        mean = reference[half].mean(axis=0)
        variance = ((reference[half] - mean) ** 2).mean()
        for i in range(length):
            for j in range(length):
                cost[i, j] += ((prefix[half, i] - reference[half, j]) ** 2).sum() / variance
    return cost


def sorted_slots(prefix: Tensor) -> np.ndarray:
    """Slots of each layer and head as rows [key; value] in an order that depends on their numbers alone."""
    rows = torch.cat([prefix[:, 0], prefix[:, 1]], dim=-1).double().numpy()
    return np.stack([[head[np.lexsort(head.T[::-1])] for head in layer] for layer in rows])


# --- matching ---


@checked
@given(seeds, st.integers(1, 6))
def test_matching_is_the_best_of_all_permutations(seed: int, length: int) -> None:
    generator = np.random.default_rng(seed)
    prefix, reference = normal(generator, 2, 2, 2, length, 3), normal(generator, 2, 2, 2, length, 3)
    reference[:, 0] = reference[:, 0] * 20 + 100  # keys in other units, and far from zero
    prefix[:, 0] = prefix[:, 0] * 20 + 100
    matched, permutation = match_slots(prefix, reference)
    for layer, head in itertools.product(range(2), range(2)):
        order = permutation[layer, head].tolist()
        assert sorted(order) == list(range(length))
        assert torch.equal(matched[layer, :, head], prefix[layer, :, head, order])
        if length > 1:
            cost = slot_cost(prefix[layer, :, head].numpy(), reference[layer, :, head].numpy())
            found = sum(cost[i, j] for j, i in enumerate(order))
            best = min(
                sum(cost[i, j] for j, i in enumerate(trial))
                for trial in itertools.permutations(range(length))
            )
            assert found == pytest.approx(best, rel=1e-9)


def test_matching_does_not_depend_on_units_or_on_a_common_offset() -> None:
    generator = np.random.default_rng(0)
    prefix, reference = normal(generator, 3, 2, 2, 6, 4), normal(generator, 3, 2, 2, 6, 4)
    permutation = match_slots(prefix, reference).permutation
    factor, offset = torch.tensor([50.0, 0.01]).view(1, 2, 1, 1, 1), normal(generator, 3, 2, 2, 1, 4) * 10
    assert torch.equal(match_slots(prefix * factor + offset, reference * factor + offset)[1], permutation)


def test_matching_keeps_the_order_where_the_reference_cannot_tell_slots_apart() -> None:
    generator = np.random.default_rng(1)
    prefix = normal(generator, 2, 2, 2, 5, 3).float()
    for reference in (torch.zeros_like(prefix), torch.full_like(prefix, 0.1)):
        matched = match_slots(prefix, reference)
        assert torch.equal(matched.prefix, prefix)
        assert torch.equal(matched.permutation, torch.arange(5).expand(2, 2, 5))
    by_values = torch.zeros_like(prefix)
    by_values[:, 1] = prefix[:, 1].flip(2)  # no key tells anything
    assert torch.equal(match_slots(prefix, by_values).prefix, prefix.flip(3))


@checked
@given(seeds)
def test_matched_mean_undoes_permutations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    reference = normal(generator, 2, 2, 3, 5, 4).float()
    trained = reference + 0.01 * normal(generator, 2, 2, 3, 5, 4).float()
    noise = [0.001 * normal(generator, 2, 2, 3, 5, 4).float() for _ in range(4)]
    weights = weights_of(generator, 4)
    aligned = [trained + n for n in noise]
    mean = matched_mean(weighted([shuffled(x, generator) for x in aligned], weights), reference)
    expected = np.average(np.stack([x.double().numpy() for x in aligned]), axis=0, weights=weights)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_matched_mean_consumes_prefixes_one_by_one() -> None:
    reference = normal(np.random.default_rng(2), 1, 2, 1, 3, 2)
    alive: list[int] = []

    def stream() -> Iterator[WeightedPrefix]:
        for number in range(3):
            alive.append(number)
            yield reference.clone(), 1.0

    torch.testing.assert_close(matched_mean(stream(), reference), reference)
    assert alive == [0, 1, 2]


@checked
@given(seeds)
def test_barycentre_descends_to_a_fixed_point_and_is_exact_for_permutations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    clients = [normal(generator, 1, 2, 1, 5, 3) for _ in range(3)]
    weights = weights_of(generator, 3)
    share = weights / weights.sum()
    variance = sum(
        w * ((x - x.mean(3, keepdim=True)) ** 2).mean(dim=(3, 4)).numpy()[0, :, 0]
        for w, x in zip(share, clients, strict=True)
    )

    def nearest(centre: Tensor) -> tuple[float, np.ndarray]:
        """The sum that is minimised, by brute force, and the mean of the orders that attain it."""
        total, mean = 0.0, np.zeros((2, 5, 3))
        for w, client in zip(share, clients, strict=True):
            squares = (client[0, :, 0, :, None] - centre[0, :, 0, None]).numpy() ** 2
            cost = (squares.sum(-1) / variance[:, None, None]).sum(0)
            trials = [list(trial) for trial in itertools.permutations(range(5))]
            costs = [cost[trial, range(5)].sum() for trial in trials]
            total += w * min(costs)
            mean += w * client[0, :, 0, trials[int(np.argmin(costs))]].numpy()
        return total, mean

    start = clients[0]
    once = barycentre(weighted(clients, weights), start, iterations=1)
    found = barycentre(weighted(clients, weights), start)
    np.testing.assert_allclose(once[0, :, 0], nearest(start)[1], atol=1e-12)
    np.testing.assert_allclose(found[0, :, 0], nearest(found)[1], atol=1e-12)  # where no slot moves
    assert nearest(found)[0] <= nearest(once)[0] + 1e-9 < nearest(start)[0]

    same = [shuffled(start, generator) for _ in range(3)]
    exact = barycentre(weighted(same, weights), same[1])
    np.testing.assert_allclose(sorted_slots(exact), sorted_slots(start), atol=1e-12)


# --- attention and stacking ---


@checked
@given(seeds, st.sampled_from([(2, 2), (4, 2), (6, 1)]), st.booleans())
def test_attention_is_the_sum_written_out(seed: int, head_counts: tuple[int, int], causal: bool) -> None:
    generator = np.random.default_rng(seed)
    query_heads, heads = head_counts
    query = normal(generator, 2, query_heads, 3, 4)
    keys, values = normal(generator, 2, heads, 3, 4), normal(generator, 2, heads, 3, 4)
    prefix_keys, prefix_values = normal(generator, heads, 5, 4), normal(generator, heads, 5, 4)
    bias = normal(generator, heads, 5)
    mask = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 1, 3, 3).clone()
    mask[1, :, :, 0] = False  # padding: the first query of the second text sees the slots alone
    output = attention_with_prefix(
        query, keys, values, prefix_keys, prefix_values, bias, mask=mask if causal else None
    )
    for text, head, position in itertools.product(range(2), range(query_heads), range(3)):
        group = head // (query_heads // heads)
        visible = mask[text, 0, position].numpy() if causal else np.ones(3)
        numerator, normaliser = numerator_and_normaliser(
            query[text, head, position].numpy(),
            np.concatenate([prefix_keys[group], keys[text, group]]),
            np.concatenate([prefix_values[group], values[text, group]]),
            np.concatenate([np.exp(bias[group].numpy()), visible]),
        )
        np.testing.assert_allclose(output[text, head, position], numerator / normaliser, atol=1e-10)


@checked
@given(seeds)
def test_attention_does_not_depend_on_the_order_of_slots(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prefix, no_bias = normal(generator, 2, 2, 2, 6, 4), torch.zeros(2, 2, 6)
    queries, own = normal(generator, 2, 3, 4, 5, 4), normal(generator, 2, 3, 2, 5, 4)
    before = prefix_attention(Stacked(prefix, no_bias), queries, own, own)
    after = prefix_attention(Stacked(shuffled(prefix, generator), no_bias), queries, own, own)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


@checked
@given(seeds, st.integers(1, 5), st.sampled_from([(2, 2), (4, 2)]))
def test_stacking_combines_outputs_by_weight_times_normaliser(
    seed: int, clients: int, head_counts: tuple[int, int]
) -> None:
    generator = np.random.default_rng(seed)
    query_heads, heads = head_counts
    lengths = generator.integers(1, 5, clients)
    prefixes = [normal(generator, 1, 2, heads, int(length), 4) for length in lengths]
    weights = weights_of(generator, clients)
    query = normal(generator, 1, 1, query_heads, 3, 4) * 2
    keys, values = normal(generator, 1, 1, heads, 4, 4), normal(generator, 1, 1, heads, 4, 4)
    stacked = stack_prefixes(weighted(prefixes, weights))
    assert stacked.prefix.shape == (1, 2, heads, lengths.sum(), 4)
    assert stacked.bias.shape == (1, heads, lengths.sum())
    output = prefix_attention(stacked, query, keys, values)[0, 0]

    share = weights / weights.sum()
    exact_bias = torch.empty(1, query_heads, 3, int(lengths.sum()), dtype=torch.float64)
    plain = np.empty((query_heads, 3, 4))
    for head, position in itertools.product(range(query_heads), range(3)):
        group = head // (query_heads // heads)
        outputs, normalisers = [], []
        for prefix in prefixes:
            numerator, normaliser = numerator_and_normaliser(
                query[0, 0, head, position].numpy(),
                np.concatenate([prefix[0, 0, group], keys[0, 0, group]]),
                np.concatenate([prefix[0, 1, group], values[0, 0, group]]),
                np.ones(prefix.shape[3] + 4),
            )
            outputs.append(numerator / normaliser)
            normalisers.append(normaliser)
        expected = np.average(outputs, axis=0, weights=share * normalisers)
        np.testing.assert_allclose(output[head, position], expected, rtol=0, atol=1e-6)
        plain[head, position] = np.average(outputs, axis=0, weights=share)
        ratio = share / normalisers
        exact_bias[0, head, position] = torch.from_numpy(np.repeat(np.log(ratio / ratio.sum()), lengths))

    # the bias that depends on the query gives the clients' plain weighted mean
    exact = attention_with_prefix(
        query[0], keys[0], values[0], stacked.prefix[0, 0], stacked.prefix[0, 1], exact_bias
    )
    np.testing.assert_allclose(exact[0], plain, rtol=0, atol=1e-6)


@checked
@given(seeds, st.integers(2, 5))
def test_stacking_is_the_weighted_mean_of_outputs_where_normalisers_agree(seed: int, clients: int) -> None:
    generator = np.random.default_rng(seed)
    first = normal(generator, 2, 2, 2, 5, 4)
    prefixes = []
    for _ in range(clients):  # keys of one client in another order, values of its own
        prefix = shuffled(first, generator)
        prefix[:, 1] = normal(generator, 2, 2, 5, 4)
        prefixes.append(prefix)
    weights = weights_of(generator, clients)
    queries, keys, values = (normal(generator, 2, 3, h, 4, 4) for h in (4, 2, 2))
    no_bias = torch.zeros(2, 2, 5)
    outputs = [prefix_attention(Stacked(x, no_bias), queries, keys, values).numpy() for x in prefixes]
    output = prefix_attention(stack_prefixes(weighted(prefixes, weights)), queries, keys, values)
    np.testing.assert_allclose(output, np.average(outputs, axis=0, weights=weights), rtol=0, atol=1e-6)


@checked
@given(seeds)
def test_stacking_is_the_weighted_mean_at_a_query_where_unlike_keys_have_equal_normalisers(seed: int) -> None:
    generator = np.random.default_rng(seed)
    query, own = normal(generator, 1, 1, 4), normal(generator, 1, 3, 4)
    prefixes = []
    for _ in range(3):
        prefix = normal(generator, 1, 2, 1, 5, 4)
        total = (prefix[0, 0, 0] @ query[0, 0] / 2).exp().sum()
        prefix[:, 0] -= 2 * total.log() * query[0, 0] / (query[0, 0] @ query[0, 0])  # now it sums to one
        prefixes.append(prefix)
    weights = weights_of(generator, 3)
    outputs = [attention_with_prefix(query, own, own, x[0, 0], x[0, 1]).numpy() for x in prefixes]
    stacked, bias = stack_prefixes(weighted(prefixes, weights))
    output = attention_with_prefix(query, own, own, stacked[0, 0], stacked[0, 1], bias[0])
    np.testing.assert_allclose(output, np.average(outputs, axis=0, weights=weights), rtol=0, atol=1e-6)


# --- compression ---


@checked
@given(seeds, st.integers(1, 5), st.sampled_from([1, 6, 20]))
def test_permuted_clients_compress_to_the_same_prefix(seed: int, clients: int, length: int) -> None:
    generator = np.random.default_rng(seed)
    client = normal(generator, 2, 2, 2, length, 3).float()
    client[:, 0] += 30
    copies = [client] + [shuffled(client, generator) for _ in range(clients - 1)]
    stacked = stack_prefixes(weighted(copies, weights_of(generator, clients)))
    compressed = cluster_slots(*stacked, length)
    assert compressed.prefix.dtype == torch.float32
    np.testing.assert_allclose(sorted_slots(compressed.prefix), sorted_slots(client), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(compressed.bias, 0, atol=1e-6)


def test_equal_slots_within_a_client_come_back_as_often_as_they_were() -> None:
    generator = np.random.default_rng(3)
    client = normal(generator, 1, 2, 1, 3, 2).float()[:, :, :, [0, 1, 1, 1, 2, 2]]
    stacked = stack_prefixes([(client, 2.0), (shuffled(client, generator), 1.0)])
    compressed = cluster_slots(*stacked, 6)
    np.testing.assert_allclose(sorted_slots(compressed.prefix), sorted_slots(client), atol=1e-6)
    np.testing.assert_allclose(compressed.bias, 0, atol=1e-6)
    zero = torch.zeros(1, 2, 1, 4, 2)
    assert torch.equal(cluster_slots(*stack_prefixes([(zero, 1.0), (zero, 2.0)]), 4).prefix, zero)


@checked
@given(seeds)
def test_tight_clusters_are_weighted_means_and_their_bias_carries_their_mass(seed: int) -> None:
    generator = np.random.default_rng(seed)
    centres = normal(generator, 1, 2, 1, 3, 8) * 10
    members = generator.permutation([0, 0, 0, 1, 1, 2, 2, 2, 2])
    slots = centres[:, :, :, members] + 1e-5 * normal(generator, 1, 2, 1, 9, 8)
    bias = normal(generator, 1, 1, 9)
    prefix, merged_bias = cluster_slots(slots, bias, 3)
    mass = bias[0, 0].exp().numpy()
    rows = torch.cat([slots[0, 0, 0], slots[0, 1, 0]], dim=-1).numpy()
    expected = {
        tuple(np.average(rows[members == c], axis=0, weights=mass[members == c]).round(8)): math.log(
            mass[members == c].sum()
        )
        for c in range(3)
    }
    found = {
        tuple(torch.cat([prefix[0, 0, 0, j], prefix[0, 1, 0, j]]).numpy().round(8)): float(
            merged_bias[0, 0, j]
        )
        for j in range(3)
    }
    for key, value in sorted(found.items()):
        nearest = min(expected, key=lambda other: sum(abs(np.subtract(key, other))))
        np.testing.assert_allclose(key, nearest, atol=3e-8)
        assert value == pytest.approx(expected[nearest], abs=1e-10)
    queries = 0.3 * normal(generator, 1, 1, 1, 20, 8)
    before = prefix_attention(Stacked(slots, bias), queries)
    after = prefix_attention(Stacked(prefix, merged_bias), queries)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-7)  # the clusters' width squared


def test_clustering_starts_also_from_a_given_prefix_and_keeps_the_better() -> None:
    generator = np.random.default_rng(4)
    reference = normal(generator, 3, 2, 3, 8, 6)
    clients = [reference + normal(generator, 3, 2, 3, 8, 6) for _ in range(6)]
    stacked = stack_prefixes(weighted(clients, np.ones(6)))

    def inertia(compressed: Tensor) -> np.ndarray:
        mass = stacked.bias[..., None, None].exp()
        mean = (mass[:, None, :, :, 0] * stacked.prefix).sum(3, keepdim=True) / 8
        deviation = mass[:, None, :, :, 0] * (stacked.prefix - mean) ** 2
        variance = deviation.sum(3, keepdim=True).mean(4, keepdim=True) / 8
        difference = stacked.prefix[:, :, :, :, None] - compressed[:, :, :, None]
        squares = (difference**2).sum(-1) / variance
        return (mass[..., 0] * squares.sum(1)).min(-1).values.sum(-1).numpy()

    alone = cluster_slots(*stacked, 8).prefix
    both = cluster_slots(*stacked, 8, start=reference).prefix
    assert (inertia(both) <= inertia(alone) + 1e-9).all()
    assert (inertia(both) < inertia(alone) - 1e-9).any()


# --- layer selection ---


def test_layers_are_selected_by_relative_change() -> None:
    reference = torch.ones(4, 2, 1, 2, 1)  # norm 2 each
    reference[3] = 10.0
    change = torch.zeros_like(reference)
    change[0, 0, 0, 0, 0], change[2, 1, 0, 1, 0], change[3, 0, 0, 0, 0] = 3.0, -3.0, 4.0
    torch.testing.assert_close(layer_scores(change, reference), torch.tensor([1.5, 0, 1.5, 0.2]).double())
    total = math.sqrt(9 + 9 + 16)
    expected = torch.tensor([3 / total, 0, 3 / total, 4 / total]).double()
    torch.testing.assert_close(layer_scores(change), expected)
    assert select_layers(change, 1, reference) == [0]  # of equal scores the lower
    assert select_layers(change, 3, reference) == [0, 2, 3]
    assert select_layers(change, 1) == [3]
    assert select_layers(change, 2) == [0, 3]
    assert select_layers(change, 1, torch.zeros_like(reference)) == [3]
    assert select_layers(torch.zeros_like(change), 2) == [0, 1]
    for count in (0, 5):
        with pytest.raises(ValueError, match="from 1 to 4"):
            select_layers(change, count)


@checked
@given(seeds, st.integers(1, 5))
def test_mean_of_selected_is_the_loop(seed: int, clients: int) -> None:
    generator = np.random.default_rng(seed)
    reference = normal(generator, 4, 2, 2, 3, 2).float()
    updates = []
    for weight in weights_of(generator, clients):
        layers = generator.permutation(4)[: generator.integers(0, 4)].tolist()
        updates.append((normal(generator, len(layers), 2, 2, 3, 2).float(), layers, float(weight)))
    expected = reference.double().numpy().copy()
    for layer in range(4):
        total, mass = np.zeros((2, 2, 3, 2)), 0.0
        for tensor, layers, weight in updates:
            if layer in layers:
                total, mass = total + weight * tensor[layers.index(layer)].double().numpy(), mass + weight
        if mass:
            expected[layer] = total / mass
    before = reference.clone()
    mean = mean_of_selected(iter(updates), reference)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(reference, before)


# --- what clients may send ---


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_weights_must_be_positive(weight: float) -> None:
    prefix = torch.ones(1, 2, 1, 2, 2)
    for rule in (
        lambda: matched_mean([(prefix, weight)], prefix),
        lambda: barycentre([(prefix, weight)], prefix),
        lambda: stack_prefixes([(prefix, weight)]),
        lambda: mean_of_selected([(prefix, [0], weight)], prefix),
    ):
        with pytest.raises(UpdateError, match="positive"):
            rule()


def test_malformed_prefixes_are_refused() -> None:
    good, longer = torch.ones(1, 2, 1, 2, 2), torch.ones(1, 2, 1, 3, 2)
    wider, broken = torch.ones(1, 2, 1, 2, 3), torch.full((1, 2, 1, 2, 2), math.nan)
    for rule in (
        lambda: match_slots(longer, good),
        lambda: matched_mean([(good, 1.0), (longer, 1.0)], good),
        lambda: stack_prefixes([(good, 1.0), (longer, 1.0), (wider, 1.0)]),
        lambda: stack_prefixes([(good[0], 1.0)]),
        lambda: layer_scores(longer, good),
        lambda: mean_of_selected([(longer, [0], 1.0)], good),
        lambda: cluster_slots(good, torch.zeros(1, 1, 2), 2, start=longer),
    ):
        with pytest.raises(UpdateError, match="shape"):
            rule()
    for rule in (lambda: match_slots(broken, good), lambda: stack_prefixes([(broken, 1.0)])):
        with pytest.raises(UpdateError, match="finite"):
            rule()
    for layers in ([0, 0], [1], [-1]):
        with pytest.raises(UpdateError, match="layers"):
            mean_of_selected([(good.expand(len(layers), -1, -1, -1, -1), layers, 1.0)], good)
    for rule in (
        lambda: matched_mean([], good),
        lambda: barycentre([], good),
        lambda: stack_prefixes([]),
        lambda: mean_of_selected([], good),
    ):
        with pytest.raises(UpdateError, match="there is no"):
            rule()
    for length in (0, 3):
        with pytest.raises(ValueError, match="from 1 to 2"):
            cluster_slots(good, torch.zeros(1, 1, 2), length)
