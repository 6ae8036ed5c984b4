"""Runs whose clients work in other processes, against the same runs in one process. Ray is a stand-in here,
which does in this process what Ray's processes do; ``test_ray.py`` has Ray itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.core.errors import DataError, FedcustomError, RecipeError, RunError
from fedcustom.deployment.parties import check_deployable
from fedcustom.federated.worker import ClientWorker
from fedcustom.methods.messages import Update
from fedcustom.methods.protocol import AggregateContext
from fedcustom.methods.tuning.client import TuningClient
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.workers.pool import MOST_REPLACED
from fedcustom.transport.workers.transport import WorkersTransport, balanced
from fedcustom.updates.transform import ClientContext, UpdateTransform
from helpers.runs import StopAt, rows_of, without_seconds
from helpers.workers import StandIn, are_equal, gap, run_both, stand_in, with_workers

__all__ = ["stand_in"]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "fedask": {"name": "lora", "variant": "fedask"},
    "memory": {"name": "prefix", "kind": "memory", "length": 4},
    "prefix": {"name": "prefix", "kind": "kv", "length": 4},
    "full": {"name": "full"},
}

TOLD = ("bytes_up", "bytes_down", "answered", "left_out", "cohort")


def alone(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with one client a batch, so that no rounding depends on who shares one."""
    return {**recipe, "training": {**recipe["training"], "cohort_width": 1}}


def rows_without_seconds(run: Path) -> list[dict[str, Any]]:
    return [without_seconds(row) for row in rows_of(run)]


@pytest.mark.parametrize("kind", list(METHODS))
def test_the_result_is_that_of_one_process(
    kind: str, small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    one, many = run_both({**small, "method": METHODS[kind]}, tmp_path)
    assert gap(one, many) < 1e-6
    for row, other in zip(rows_of(one), rows_of(many), strict=True):
        assert {key: row.get(key) for key in TOLD} == {key: other.get(key) for key in TOLD}
    assert {place for place, name in stand_in.calls if name == "work"} == {0, 1}


@pytest.mark.parametrize("kind", ["lora", "memory", "full"])
def test_it_is_equal_bit_by_bit_with_one_client_a_batch(
    kind: str, small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    one, many = run_both(alone({**small, "method": METHODS[kind]}), tmp_path)
    assert are_equal(one, many)
    assert rows_without_seconds(one) == rows_without_seconds(many)


@pytest.mark.parametrize(
    "settings",
    [
        {"personalisation": {"keep": ["head"]}, "training": {"batch_size": 8, "fit_head": False}},
        {"compression": {"kind": "top_k", "error_feedback": True}},
        {"aggregation": {"correction": "scaffold"}, "training": {"optimizer": "sgd", "momentum": 0.0}},
        {"attack": {"kind": "alie", "fraction": 0.5}},
        {"attack": {"kind": "label_flip", "fraction": 0.5}, "noise": {"labels": 0.3}},
        {"participation": {"dropout": 0.4}},
        {"baseline": "local"},
    ],
    ids=["own parts", "compression", "scaffold", "alie", "poison", "absent", "local"],
)
def test_what_acts_on_clients_acts_on_them_at_workers(
    settings: dict[str, Any], small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    recipe = {**small, "method": METHODS["lora"], **settings}
    recipe["training"] = {"batch_size": 8, "cohort_width": 1, **settings.get("training", {})}
    if "correction" in settings.get("aggregation", {}):
        recipe["training"] |= {"clip_norm": 0.0, "learning_rate": 0.1}
    one, many = run_both(recipe, tmp_path)
    assert rows_without_seconds(one) == rows_without_seconds(many)
    if settings.get("baseline") != "local":
        assert are_equal(one, many)


def test_public_texts(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    one, many = run_both({**small, "method": {"name": "distillation"}, "public": {"fraction": 0.2}}, tmp_path)
    assert rows_without_seconds(one) == rows_without_seconds(many)


def test_prompts(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    method = {"name": "prompt_engineering", "examples": 4, "instructions": ["{label}", "a {label}"]}
    one, many = run_both({**small, "method": method, "training": {}}, tmp_path)
    assert rows_without_seconds(one) == rows_without_seconds(many)


def test_secure_sums(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    recipe = {**alone(small), "method": METHODS["lora"], "secure_sum": {"on": True, "most_examples": 60}}
    recipe["training"]["fit_head"] = False
    one, many = run_both(recipe, tmp_path)
    assert are_equal(one, many)
    assert rows_without_seconds(one) == rows_without_seconds(many)


class Halved(UpdateTransform):
    """A transform of the caller's, with a state of its own and a client's."""

    name = "halved"

    def on_client(self, update: Update, context: ClientContext) -> Update:
        seen = context.memory.values["seen"] = context.memory.values.get("seen", 0) + 1
        return replace(update, tensors={n: t * 0.5 / seen for n, t in update.tensors.items()})

    def on_aggregate(self, delta: Any, context: AggregateContext) -> Any:
        return {name: tensor * 2 for name, tensor in delta.items()}


def test_transforms_of_the_caller(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    recipe = {**alone(small), "method": METHODS["lora"]}
    recipe["training"]["fit_head"] = False
    assert are_equal(*run_both(recipe, tmp_path, lambda: {"transforms": [Halved()]}))


@pytest.mark.parametrize("place", ["client", "sum"])
def test_noise_of_clients(place: str, small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    """The workers of clients that noise what they send draw the same noise; sums have it from here."""
    privacy = {"unit": "client", "noise": place, "noise_multiplier": 0.5, "delta": 1e-3}
    recipe = {**alone(small), "privacy": {**privacy, "randomness": "seeded"}}
    if place == "sum":
        recipe["secure_sum"] = {"on": True}
    else:
        recipe["privacy"]["accept_noise"] = True
    one, many = run_both(recipe, tmp_path)
    assert are_equal(one, many)
    assert not any(row["left_out"] for row in rows_of(many)[1:])


def test_clients_that_hide_their_rows(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "randomness": "seeded"}
    one, many = run_both({**alone(small), "privacy": privacy}, tmp_path)
    assert are_equal(one, many)


def test_a_run_is_resumed_as_if_it_had_not_stopped(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    recipe = with_workers({**small, "method": METHODS["lora"], "rounds": {"count": 3}})
    fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(recipe, out=tmp_path / "run", callbacks=[StopAt(2)])
    fedcustom.run(recipe, out=tmp_path / "run", resume=True)
    assert are_equal(tmp_path / "whole", tmp_path / "run")
    assert rows_without_seconds(tmp_path / "whole") == rows_without_seconds(tmp_path / "run")


def test_a_run_goes_on_with_other_workers(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    recipe = {**small, "method": METHODS["lora"], "rounds": {"count": 3}}
    fedcustom.run(recipe, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(with_workers(recipe), out=tmp_path / "run", callbacks=[StopAt(1)])
    with pytest.raises(RuntimeError, match="stopped"):
        fedcustom.run(with_workers(recipe, 3), out=tmp_path / "run", callbacks=[StopAt(2)], resume=True)
    fedcustom.run(recipe, out=tmp_path / "run", resume=True)
    assert gap(tmp_path / "whole", tmp_path / "run") < 1e-6


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_worker_that_dies_is_replaced(
    call: int, small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    """In the first exchange of a head's fit, in a further one that needs what the process kept, and later."""
    recipe = alone({**small, "method": METHODS["lora"]})
    one = fedcustom.run(recipe, out=tmp_path / "alone")
    stand_in.dies = {0: call}
    told = Told()
    many = fedcustom.run(with_workers(recipe), out=tmp_path / "workers", callbacks=[told])
    assert are_equal(one.directory, many.directory)
    assert rows_without_seconds(one.directory) == rows_without_seconds(many.directory)
    (said,) = [text for text in told.notes if "worker" in text]
    assert said.startswith("worker 1 of 2 died (worker exited with signal 9); another takes its place")
    assert len(stand_in.made) == 3


class Told(fedcustom.Callback):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_workers_that_die_again_and_again_stop_the_run(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    stand_in.dies = dict.fromkeys(range(20), 1)
    with pytest.raises(RunError, match=f"workers: {MOST_REPLACED + 1} died in this run, .*--resume"):
        fedcustom.run(with_workers(small), out=tmp_path / "run")
    stand_in.dies = {}
    fedcustom.run(with_workers(small), out=tmp_path / "run", resume=True)


def test_a_client_that_fails_is_left_out(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = TuningClient.prepare

    def prepare(self: TuningClient, task: Any, client: Any, *rest: Any, **more: Any) -> Any:
        if client.name == "site-1" and task.round_number == 2:
            raise DataError("no disk")
        return given(self, task, client, *rest, **more)

    monkeypatch.setattr(TuningClient, "prepare", prepare)
    one, many = run_both({**small, "method": METHODS["lora"]}, tmp_path)
    left_out = [row.get("left_out") for row in rows_of(many)]
    assert left_out == [row.get("left_out") for row in rows_of(one)]
    assert "no disk" in str(left_out)
    assert "in prepare" in (many / "warnings.log").read_text()  # the worker's own traceback
    assert gap(one, many) < 1e-6


def test_what_the_server_sees_does_not_depend_on_batches_ahead(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_workers(alone({**small, "method": METHODS["lora"]}), 3)
    first = fedcustom.run(recipe, out=tmp_path / "first")
    monkeypatch.setattr("fedcustom.transport.workers.transport.AHEAD", 1)
    second = fedcustom.run(recipe, out=tmp_path / "second")
    assert are_equal(first.directory, second.directory)


def test_a_state_travels_once_for_all_clients(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn
) -> None:
    recipe = alone({**small, "method": METHODS["lora"]})
    recipe["training"]["fit_head"] = False
    fedcustom.run(with_workers(recipe), out=tmp_path / "run")
    assert sum(name == "work" for _, name in stand_in.calls) == 2 * 4  # rounds, clients
    assert stand_in.puts == 2


def test_one_client_needs_no_workers(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    run = fedcustom.run(with_workers({**small, "baseline": "centralised"}), out=tmp_path / "run")
    assert run.summary["client_count"] == 4
    assert not stand_in.made


def test_check_and_estimate(small: dict[str, Any], stand_in: StandIn) -> None:
    found = fedcustom.check(with_workers({**small, "method": METHODS["lora"]}))
    assert found.settings["workers"]["count"] == 2
    assert found.resources is not None
    assert {name for _, name in stand_in.calls} == {"ready", "load", "work"}


def test_other_rows_at_a_worker_are_refused(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcustom.federated.worker.of_data", lambda *_: {"other": 1})
    with pytest.raises(DataError, match="a worker reads other rows than this process"):
        fedcustom.run(with_workers(small), out=tmp_path / "run")


def test_what_a_worker_cannot_load_is_one_line(
    small: dict[str, Any], tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: ClientWorker, settings: str) -> str:
        raise DataError("train.jsonl: no such file")

    monkeypatch.setattr(ClientWorker, "load", load)
    with pytest.raises(DataError, match=r"^at a worker: train.jsonl: no such file$"):
        fedcustom.run(with_workers(small), out=tmp_path / "run")


def test_a_cluster_that_is_too_small(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    stand_in.cpus = 3
    with pytest.raises(RunError, match=r"workers.count = 2: with workers.cpus = 2 they need 4 CPUs, and Ray"):
        fedcustom.run(with_workers(small, cpus=2), out=tmp_path / "run")
    with pytest.raises(RunError, match=r"workers.gpus = 0.5 they need 1 GPUs, and Ray has 0"):
        fedcustom.run(with_workers(small, gpus=0.5), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "workers.count = 0"),
        ({"count": 2, "threads": 0}, "workers.threads = 0"),
        ({"count": 2, "gpus": 1.5}, "workers.gpus: must be a part of one GPU, or a whole number"),
        ({"count": 2, "address": "http://x"}, "workers.address: must be host:port, ray://host:port, or auto"),
        ({"threads": 2}, "threads: has no effect without workers.count"),
        ({"count": 2, "worker": 1}, "workers.worker: unknown setting; allowed: count, cpus"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe({"workers": settings})
    assert message in str(error.value)


def test_no_gpus_for_a_model_on_one() -> None:
    with pytest.raises(RecipeError, match=r"workers.gpus = 0: model.device = 'cuda' needs one"):
        load_recipe({"model": {"device": "cuda"}, "workers": {"count": 2, "gpus": 0}})


def test_a_deployed_run_refuses_them() -> None:
    with pytest.raises(RecipeError, match=r"\[workers\]: is for simulations"):
        check_deployable(load_recipe({"workers": {"count": 2}}))


def test_without_ray(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        FedcustomError, match=r"workers.count: needs the package ray: pip install 'fedcustom\[ray\]'"
    ):
        fedcustom.run(with_workers(small), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clients_are_shared_out_evenly() -> None:
    sizes = {"a": 9.0, "b": 1.0, "c": 5.0, "d": 5.0, "e": 2.0}
    assert balanced(sizes, 2) == {"a": 0, "c": 1, "d": 1, "e": 0, "b": 1}  # 11 and 11
    assert balanced({}, 3) == {}


def test_what_nobody_took_is_dropped(small: dict[str, Any], tmp_path: Path, stand_in: StandIn) -> None:
    """A round that is refused leaves replies behind; the next one does not see them."""
    seen: list[int] = []
    given = WorkersTransport.exchange

    def cut_short(self: WorkersTransport, tasks: Any, number: int, absent: Any = ()) -> Any:
        seen.append(number)
        for place, reply in enumerate(given(self, tasks, number, absent)):
            if number == 1 and place == 1:
                return
            assert reply.update is not None
            assert reply.task.round_number == number
            yield reply

    recipe = alone({**small, "method": METHODS["lora"]})
    recipe["training"]["fit_head"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkersTransport, "exchange", cut_short)
        run = fedcustom.run(with_workers(recipe), out=tmp_path / "run")
    assert seen == [1, 2]
    assert list(run.history["round"])[-1] == 2
