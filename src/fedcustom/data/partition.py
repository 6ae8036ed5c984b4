"""Partitions of examples over clients: every example belongs to exactly one client."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from ..core import plugins
from ..core.errors import DataError, PluginError
from .many_clients import Members, Numbers
from .settings import OFFERED_PARTITIONS, ClientSettings

Partition = list[list[int]]

Partitioner = Callable[[Sequence[int], ClientSettings, int], Sequence[Sequence[int]]]
"""What another package offers under ``fedcustom.partitions``, as ``my_partition = "my_package:partition"``: a
pure function of the examples' labels, the settings and a seed, to the positions that each of
``settings.count`` clients holds, each position once.
"""


def partition_examples(labels: Sequence[int], settings: ClientSettings, seed: int) -> Partition:
    """The examples' positions, client by client.

    ``labels`` gives each example's label (all zero where there are none: then only ``iid`` and ``quantity``
    serve). Label skew is that of Hsu et al. 2019 and Yurochkin et al. 2019 as implemented in
    ``flwr-datasets``: each label's examples are shared out in proportions drawn from a Dirichlet
    distribution. A client that is left with fewer than ``minimum_examples`` is filled up from the largest
    client, where the library would draw again and give up.

    Raises:
        DataError: more clients than examples, or a partition that cannot be made.
        PluginError: another package's partition cannot be loaded, fails, or is no partition.
    """
    rows, count = len(labels), settings.count
    _refuse_too_many(rows, settings)
    if settings.partition in OFFERED_PARTITIONS:
        return fill_up(_by_plugin(labels, settings, seed), settings.minimum_examples)
    kinds = len(set(labels))
    if settings.partition in ("dirichlet", "pathological") and kinds < 2:
        raise DataError(
            f"clients.partition: {settings.partition} needs labels; allowed here: iid, quantity, natural"
        )
    generator = np.random.default_rng([seed, 7])
    if settings.partition == "iid":
        parts = [part.tolist() for part in np.array_split(generator.permutation(rows), count)]
    elif settings.partition == "quantity":
        parts = _by_quantity(rows, settings, generator)
    elif settings.partition == "dirichlet":
        parts = _by_label_skew(labels, settings, int(generator.integers(2**31)))
    elif settings.partition == "pathological":
        if settings.labels_per_client > kinds:
            raise DataError(
                f"clients.labels_per_client: {settings.labels_per_client}; there are {kinds} labels"
            )
        if count * settings.labels_per_client < kinds:
            raise DataError(
                f"clients.labels_per_client: {count} clients of {settings.labels_per_client} labels "
                f"cannot hold all {kinds} labels"
            )
        parts = _by_few_labels(labels, settings, generator)
    else:
        raise DataError("clients.partition: natural clients come from a column, not from a partition")
    return fill_up(parts, settings.minimum_examples)


def _refuse_too_many(rows: int, settings: ClientSettings) -> None:
    count, least = settings.count, settings.minimum_examples
    if count * least > rows:
        raise DataError(
            f"clients.count: {count} clients of at least {least} examples need {count * least}; "
            f"there are {rows}"
        )


def compact_partition(rows: int, settings: ClientSettings, seed: int) -> Members:
    """The same as :func:`partition_examples` for ``iid`` and ``quantity``, for a million clients: no object
    for each of them.

    Raises:
        DataError: more clients than examples.
    """
    _refuse_too_many(rows, settings)
    generator, count = np.random.default_rng([seed, 7]), settings.count
    if settings.partition == "iid":
        order = generator.permutation(rows)
        small, larger = divmod(rows, count)  # as numpy.array_split cuts
        sizes = np.full(count, small, dtype=np.int64)
        sizes[:larger] += 1
        ends = np.concatenate([[0], np.cumsum(sizes)])
    else:
        cuts = _quantity_cuts(rows, settings, generator)
        order = generator.permutation(rows)
        ends = np.concatenate([[0], cuts, [rows]])
    return _filled_up(Members(order, ends), settings.minimum_examples)


def _filled_up(members: Members, minimum: int) -> Members:
    """What :func:`fill_up` does. Rows leave a client from its end, and come to another's end."""
    sizes, count = members.sizes, len(members)
    if int(sizes.min()) >= minimum:
        return members
    heap: list[int] = (-sizes * count + np.arange(count)).tolist()  # the largest first, then the first
    heapq.heapify(heap)
    gained: dict[int, list[int]] = {}
    kept = sizes.copy()  # of a client's own rows; who gives has not gained, or gives what it gained last

    def pop(number: int) -> int:
        if gained.get(number):
            return gained[number].pop()
        kept[number] -= 1
        return int(members.rows[members.ends[number] + kept[number]])

    for number in np.flatnonzero(sizes < minimum).tolist():
        while sizes[number] < minimum:
            while (giver := heap[0] % count) is not None and -(heap[0] // count) != sizes[giver]:
                heapq.heappop(heap)
            gained.setdefault(number, []).append(pop(giver))
            sizes[giver] -= 1
            sizes[number] += 1
            for changed in (giver, number):
                heapq.heappush(heap, int(-sizes[changed] * count + changed))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    rows = np.empty_like(members.rows)
    owner = np.repeat(np.arange(count), members.sizes)
    within = np.arange(len(rows)) - members.ends[owner]
    stays = within < kept[owner]
    rows[(ends[owner] + within)[stays]] = members.rows[stays]
    for number, own in gained.items():
        rows[ends[number] + kept[number] : ends[number + 1]] = own
    return Members(rows, ends)


def natural_partition(names: Sequence[str]) -> dict[str, list[int]]:
    """The examples' positions by the client that each row names, clients in sorted order."""
    clients: dict[str, list[int]] = {name: [] for name in sorted(set(names))}
    for position, name in enumerate(names):
        clients[name].append(position)
    return clients


def fill_up(parts: Partition, minimum: int) -> Partition:
    """Move examples from the largest client to those with fewer than ``minimum``, last first, one at a
    time.
    """
    parts = [list(part) for part in parts]
    sizes = [(-len(part), number) for number, part in enumerate(parts)]  # the largest first, and some stale
    heapq.heapify(sizes)
    for number, part in enumerate(parts):
        while len(part) < minimum:
            while -sizes[0][0] != len(parts[sizes[0][1]]):
                heapq.heappop(sizes)
            giver = sizes[0][1]
            part.append(parts[giver].pop())
            for changed in (giver, number):
                heapq.heappush(sizes, (-len(parts[changed]), changed))
    return parts


def _by_plugin(labels: Sequence[int], settings: ClientSettings, seed: int) -> Partition:
    point = OFFERED_PARTITIONS[settings.partition]
    partition: Partitioner = plugins.load(point)
    try:
        parts = [[int(position) for position in part] for part in partition(labels, settings, seed)]
    except Exception as error:  # whatever the other package's code raises
        raise PluginError(f"{plugins.title(point)} failed: {type(error).__name__}: {error}") from error
    placed = sorted(position for part in parts for position in part)
    if len(parts) != settings.count or placed != list(range(len(labels))):
        raise PluginError(
            f"{plugins.title(point)}: must give each of {len(labels)} examples to one of "
            f"{settings.count} clients"
        )
    return parts


def _by_quantity(rows: int, settings: ClientSettings, generator: np.random.Generator) -> Partition:
    """Labels mixed, sizes in proportions drawn from a Dirichlet distribution."""
    cuts = _quantity_cuts(rows, settings, generator)
    return [part.tolist() for part in np.split(generator.permutation(rows), cuts)]


def _quantity_cuts(rows: int, settings: ClientSettings, generator: np.random.Generator) -> Numbers:
    """Where the rows of each client but the last end, (clients - 1,)."""
    shares = np.cumsum(generator.dirichlet(np.full(settings.count, settings.alpha)))
    cuts: Numbers = (shares[:-1] * rows).astype(int)
    return cuts


def _by_label_skew(labels: Sequence[int], settings: ClientSettings, seed: int) -> Partition:
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=settings.count,
        partition_by="label",
        alpha=settings.alpha,
        min_partition_size=0,
        self_balancing=False,
        seed=seed,
    )
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "position": range(len(labels))})
    return [partitioner.load_partition(number)["position"][:] for number in range(settings.count)]


def _by_few_labels(
    labels: Sequence[int], settings: ClientSettings, generator: np.random.Generator
) -> Partition:
    """``labels_per_client`` labels to each client, dealt round by round from a shuffled list.

    So every label finds a home; the partitioner of ``flwr-datasets`` drops the examples of labels that it
    deals to nobody.
    """
    kinds = generator.permutation(sorted(set(labels))).tolist()
    dealt = [kinds[turn % len(kinds)] for turn in range(settings.count * settings.labels_per_client)]
    parts: Partition = [[] for _ in range(settings.count)]
    for kind in kinds:
        owners = [turn // settings.labels_per_client for turn, label in enumerate(dealt) if label == kind]
        positions = generator.permutation(np.flatnonzero(np.asarray(labels) == kind))
        for owner, share in zip(owners, np.array_split(positions, len(owners)), strict=True):
            parts[owner].extend(share.tolist())
    return parts
