"""A million clients without an object for each: the same clients, rows and order as with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedcustom.data import row_file
from fedcustom.data.build import build_data
from fedcustom.data.many_clients import ManyClients, names_of, sorted_members, train_sizes
from fedcustom.data.partition import compact_partition, natural_partition, partition_examples
from fedcustom.data.settings import ClientSettings, DataSettings


@pytest.mark.parametrize("partition", ["iid", "quantity"])
@pytest.mark.parametrize(
    ("rows", "count", "least"), [(40, 7, 1), (500, 200, 1), (500, 90, 3), (64, 64, 1), (90, 30, 3)]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_partitions_are_those_of_lists(partition: str, rows: int, count: int, least: int, seed: int) -> None:
    settings = ClientSettings(partition=partition, count=count, minimum_examples=least, alpha=0.3)
    members = compact_partition(rows, settings, seed)
    assert [members[number] for number in range(count)] == partition_examples([0] * rows, settings, seed)


def test_natural_members_are_those_of_lists() -> None:
    drawn = np.random.default_rng(0).integers(0, 50, 400)
    names = [f"{'ünï' if n % 7 == 0 else 'a'}{n}" for n in drawn.tolist()]
    sorted_names, members = sorted_members(iter(names))
    expected = natural_partition(names)
    assert list(sorted_names) == list(expected)
    assert [members[i] for i in range(len(members))] == list(expected.values())
    assert [sorted_names.index(name) for name in expected] == list(range(len(expected)))
    with pytest.raises(ValueError, match="nobody"):
        sorted_names.index("nobody")


def write(folder: Path, name: str, rows: int) -> None:
    generator = np.random.default_rng(len(name))
    lines = [
        {"source": f"word {i} ünder", "target": f" {i % 9}", "owner": f"o{int(generator.integers(0, 30))}"}
        for i in range(rows)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("partition", ["iid", "quantity", "natural"])
@pytest.mark.parametrize("task", ["generation", "classification"])
def test_built_data_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition: str, task: str
) -> None:
    write(tmp_path, "train", 120)
    for name in ("test", "development"):
        (tmp_path / f"{name}.jsonl").write_text('{"source": "a word", "target": " 3"}\n')
    columns = (
        {"prompt": "{source}", "target": "{target}"}
        if task == "generation"
        else {"text": "{source}", "label": "target"}
    )
    data = DataSettings(source=str(tmp_path), task=task, test="test", development="development", **columns)
    column = "owner" if partition == "natural" else None
    clients = ClientSettings(partition=partition, count=40, column=column, test_fraction=0.0)
    plain = build_data(data, clients, seed=5)
    monkeypatch.setattr(row_file, "LARGE_FILE", 1)
    many = build_data(data, clients, seed=5)
    assert isinstance(many.clients, ManyClients)
    assert not isinstance(plain.clients, ManyClients)
    assert list(many.clients) == list(plain.clients)
    assert dict(many.clients) == plain.clients
    assert [e.fields for c in many.clients.values() for e in c.train] == [
        e.fields for c in plain.clients.values() for e in c.train
    ]
    assert train_sizes(many.clients) == train_sizes(plain.clients)
    assert list(names_of(many.clients)) == names_of(plain.clients)
    assert (many.task, many.development, many.test) == (plain.task, plain.development, plain.test)
    assert "nobody" not in many.clients
