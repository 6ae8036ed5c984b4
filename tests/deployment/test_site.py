"""A site by itself, without the engine: its file, its data, its policy, its memory and its audit log."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import BertConfig

from fedcustom.core.bounded_json import read_json
from fedcustom.core.errors import (
    DeploymentError,
    FedcustomError,
    PolicyError,
    RecipeError,
    UpdateError,
    WireError,
)
from fedcustom.core.files import held, holder
from fedcustom.core.tensors import equal
from fedcustom.data.build import build_data
from fedcustom.data.party_data import read_own
from fedcustom.deployment.local import write_parts
from fedcustom.deployment.nvflare.bridge import BridgeError, BridgeListener, connect
from fedcustom.deployment.nvflare.controller import MAX_HEAD_LENGTH
from fedcustom.deployment.nvflare.jobs import CONTROLLER, EXECUTOR
from fedcustom.deployment.nvflare.kits import _check_names, provision
from fedcustom.deployment.parties import RUN_FILE, check_deployable, run_id
from fedcustom.deployment.replies import MAX_LABELS
from fedcustom.deployment.site.data import SiteDataSettings, check_labels, read_site, told_labels
from fedcustom.deployment.site.ledger import Ledger
from fedcustom.deployment.site.memory import RoundMemory
from fedcustom.deployment.site.policy import check_outgoing, check_recipe
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.settings import PolicySettings, SiteSettings, load_site
from fedcustom.evaluation.statistics import (
    check_statistics,
    classification_statistics,
    mean_statistics,
    pooled_metrics,
)
from fedcustom.federated.resolve import resolved
from fedcustom.methods import Answer, Memory, Update, Work
from fedcustom.methods.tuning.messages import TrainTask
from fedcustom.models.memory_mapping import leave_memory, parked
from fedcustom.models.pooling import Pooling
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.channel import Packed, update_length
from fedcustom.transport.messages import read_update, values_of
from fedcustom.updates.layout import describe, laid_out
from fedcustom.updates.pipeline import on_client, on_server, update_transforms
from fedcustom.updates.settings import CompressionSettings
from fedcustom.updates.transform import ClientContext, UpdateContext
from helpers.rows import make_rows, write_jsonl

RUN = "0123456789abcdef"

# --- its file ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threads = 0", "threads = 0"),
        ("[policy]\nmethod = ['prefix']", r"unknown key policy.method; allowed: .*did you mean 'methods'"),
        ("[policy]\nmethods = ['prefx']", r"unknown method 'prefx'.*did you mean 'prefix'"),
        ("[data]\ntrain = 3", "data.train = 3"),
        ("[data", "not TOML"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(DeploymentError, match=message):
        load_site(tmp_path / "site.toml")
    with pytest.raises(DeploymentError, match="no such file"):
        load_site(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("server", "sites", "message"),
    [
        ("fl.example.org", ["a", "a"], "'a' is there twice"),
        ("fl.example.org", ["a b"], "'a b' cannot be a site's name"),
        ("fl.example.org", ["../x"], "cannot be a site's name"),
        ("fl.example.org", [], "name one site at least"),
        ("no host", ["a"], "no host name"),
        ("server-1", ["server-1"], "is there twice, or is the server's name"),
    ],
)
def test_names_that_cannot_be(server: str, sites: list[str], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        _check_names(server, sites)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "local"}, "baseline = 'local'"),
        ({"attack": {"kind": "sign_flip"}}, r"\[attack\]: is for simulations"),
        ({"participation": {"dropout": 0.5}}, r"\[participation\]: is for simulations"),
        ({"noise": {"labels": 0.2}}, r"\[noise\]: is for simulations"),
        ({"evaluation": {"perturb": ["typos"]}}, "evaluation.perturb: is for simulations"),
    ],
)
def test_what_has_a_meaning_in_simulations_alone(small: dict[str, Any], change: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_deployable(resolved(load_recipe({**small, **change})))


# --- its data ---


def test_a_site_with_its_own_columns_is_the_client_of_the_simulation(
    small: dict[str, Any], data_folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe({**small, "data": {"source": str(data_folder), "max_length": 24}})
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    for number, (name, client) in enumerate(data.clients.items()):
        rows = [
            {"frage": row["text"], "klasse": row["label"]} for row in make_rows(160, 0) if row["site"] == name
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        declared = SiteDataSettings(
            train=f"{name}.jsonl", text="{frage}", label="klasse", columns=["frage", "klasse"], max_labels=3
        )
        own = read_site(declared, tmp_path, recipe.data, recipe.public)
        assert told_labels(declared, own) == ["animal", "food", "place"]
        assert own.client(name, number, data.task.labels, recipe.clients, recipe.seed) == client


def test_parts_that_were_written_are_read_as_they_were(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(small)
    data = build_data(recipe.data, recipe.clients, recipe.seed)
    name, client = next(iter(data.clients.items()))
    parts = {"train": client.train, "development": client.development, "test": client.test}
    own = read_own(write_parts(tmp_path, parts, data), tmp_path, recipe.data, recipe.public)
    assert own.client(name, 3, data.task.labels, recipe.clients, 99) == client


# --- what it tells of its evaluation ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(2, 5), st.integers(0, 10**6))
def test_statistics_of_sites_are_those_of_all_examples(sizes: list[int], labels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores = [random.normal(size=(size, labels)) for size in sizes]
    truth = [random.integers(labels, size=size).tolist() for size in sizes]
    told = [
        check_statistics(classification_statistics(s, t), labels) for s, t in zip(scores, truth, strict=True)
    ]
    found = pooled_metrics(json.loads(json.dumps(told)))
    everything, all_true = np.concatenate(scores), [label for part in truth for label in part]
    predicted = everything.argmax(axis=1)
    odds = np.exp(everything) / np.exp(everything).sum(axis=1, keepdims=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(all_true, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(all_true, predicted, average="macro"))
    assert found["loss"] == pytest.approx(log_loss(all_true, odds, labels=list(range(labels))))


@pytest.mark.parametrize(
    "told",
    [
        {"examples": 2, "confusion": [[1, 0], [0, 0]], "loss": 1.0},
        {"examples": 1, "confusion": [[1, 0]], "loss": 1.0},
        {"examples": 1, "confusion": [[1, 0], [0, 0]], "loss": float("nan")},
        {"examples": 1, "confusion": [[2, 0], [-1, 0]], "loss": 1.0},
        {"examples": "1"},
        {},
    ],
)
def test_statistics_that_are_not_sound(told: dict[str, Any]) -> None:
    with pytest.raises(UpdateError):
        check_statistics(told, 2)


# --- what travels ---


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["float16", "bfloat16", "int8", "int4", "top_k"]),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_what_is_unpacked_apart_is_what_a_simulation_gives(
    kind: str, shapes: list[tuple[int, int]], dropped: int, seed: int
) -> None:
    """Both ends apart, with JSON between them, against what a simulation makes of it."""
    random = torch.Generator().manual_seed(seed)
    sent = {f"t{i}": torch.randn(*shape, generator=random) for i, shape in enumerate(shapes)}
    change = {name: torch.randn(t.shape, generator=random) for name, t in list(sent.items())[dropped:]}
    change |= {"new": torch.randn(3, generator=random)} if not change else {}
    compression = CompressionSettings(kind=kind)  # type: ignore[arg-type]
    here, there = update_transforms(compression), update_transforms(compression)
    context = ClientContext("a", TrainTask(sent, round_number=1), Memory())
    coded = on_client(here, Update(change), context)
    packed = Packed.of(coded)
    travelled = Packed(packed.tensors, json.loads(json.dumps(packed.layout))).update(Update())
    expected = on_server(here, coded, context).tensors
    received = on_server(there, travelled, UpdateContext("a", context.task)).tensors
    assert received.keys() == expected.keys() == change.keys()
    assert all(torch.equal(received[name], expected[name]) for name in change)
    assert update_length(coded) == packed.length({"weight": 1.0})


@pytest.mark.parametrize(
    "layout",
    [
        [7], [-1], ["0"], "x", {"a": ["F32", [2**40]]}, {"a": ["F99", [2]]}, {"a": ["F32", "2"]},
        {"a": [["F32"], [2]]}, {"a": ["F32", [1] * 9]},
    ],
)  # fmt: skip
def test_a_layout_is_not_trusted(layout: Any) -> None:
    with pytest.raises(WireError):
        laid_out(layout, {"t": torch.zeros(2)})


def test_a_layout_takes_no_memory() -> None:
    like = laid_out({"a": ["F32", [2**10, 2**10]]}, {})["a"]
    assert like.numel() == 2**20
    with pytest.raises(WireError, match="far more numbers than were sent"):
        laid_out({"a": ["F32", [2**20, 2**20]]}, {})
    assert like.untyped_storage().nbytes() == 4
    assert describe({"t": torch.zeros(2)}, {"t": torch.ones(2)}) is None


# --- its memory ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.data())
def test_memory_goes_back_with_the_run(rounds: list[int], data: st.DataObject) -> None:
    """Against a plain dict: worked rounds with jumps back, and forgetting what no checkpoint needs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        memory, plain = RoundMemory(Path(folder)), dict[int, int]()
        for count, number in enumerate(rounds):
            plain = {n: value for n, value in plain.items() if n < number}
            expected = plain[max(plain)] if plain else None
            assert memory.before(number).values.get("count") == expected
            plain[number] = count
            memory.save(number, Memory({"t": torch.full((2,), float(count))}, {"count": count}))
            kept = data.draw(st.sets(st.integers(0, number), max_size=2))
            memory.prune(kept)
            for checkpoint in kept:
                known = [n for n in plain if n <= checkpoint]
                found = memory.after(checkpoint)
                assert found.values.get("count") == (plain[max(known)] if known else None)
            assert float(memory.after(99).tensors["t"][0]) == count
            if kept:  # the run goes back to one of these at most
                plain = {n: v for n, v in plain.items() if n >= max(kept) or n in {
                    max((m for m in plain if m <= c), default=-1) for c in kept}}  # fmt: skip


# --- its policy ---


def test_the_policy_wins_over_the_recipe(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(small)
    listed = {"base_models": [small["model"]["base"]]}
    check_recipe(PolicySettings(methods=["prefix"], **listed), recipe)
    for policy, message in (
        (
            PolicySettings(methods=["lora"], **listed),
            "method 'prefix' is not allowed here; allowed: lora",
        ),
        (PolicySettings(base_models=["other"]), "policy.base_models"),
        (PolicySettings(minimum_noise=0.5, **listed), "policy.minimum_noise = 0.5"),
        (
            PolicySettings(least_batch_size=9, **listed),
            "least_batch_size = 9: the recipe says",
        ),
    ):
        with pytest.raises(PolicyError, match=message):
            check_recipe(policy, recipe)
    with pytest.raises(PolicyError, match="trust_remote_code"):
        check_recipe(PolicySettings(**listed), load_recipe(recipe, {"model.trust_remote_code": True}))
    with pytest.raises(PolicyError, match="least_steps = 3: the recipe says"):
        check_recipe(
            PolicySettings(least_steps=3, **listed), load_recipe(recipe, {"training.local_steps": 2})
        )
    ledger = Ledger(tmp_path / "ledger.json")
    check_outgoing(PolicySettings(), "work", {"loss": 1.0, "counts": [1, 2]}, 10, ledger)
    with pytest.raises(PolicyError, match=r"would hold a text \(passages.text\)"):
        check_outgoing(PolicySettings(), "work", {"passages": [{"text": "private"}]}, 10, ledger)
    with pytest.raises(PolicyError, match="max_message_megabytes = 1"):
        check_outgoing(PolicySettings(max_message_megabytes=1), "work", {}, 1_000_001, ledger)
    ledger.note_run(RUN)
    ledger.add(RUN, bytes=600_000)
    for key in ("max_total_megabytes", "max_megabytes_per_day"):
        check_outgoing(PolicySettings(**{key: 1}), "work", {}, 400_000, ledger)
        with pytest.raises(PolicyError, match=f"{key} = 1"):
            check_outgoing(PolicySettings(**{key: 1}), "work", {}, 400_001, ledger)


# --- its resident process ---


@pytest.fixture
def resident(small: dict[str, Any], tmp_path: Path) -> Any:
    """Makes a site with a policy, and shows it the recipe of a run."""

    def make(**policy: Any) -> tuple[Resident, dict[str, Any]]:
        rows = [row for row in make_rows(160, 0) if row["site"] == "site-1"]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        data = SiteDataSettings(
            train="rows.jsonl", columns=["text", "label"], text="{text}", label="label", max_labels=3
        )
        choices = {"sums": True, "least_examples": 4, "base_models": [small["model"]["base"]]}
        site = SiteSettings(data=data, policy=PolicySettings(**choices | policy))
        made = Resident("site-1", site, tmp_path, tmp_path / "own")
        content = resolved(load_recipe(small)).model_dump(mode="json", exclude_none=True)
        said = made.handle({"kind": "describe", "run": RUN, "values": {"recipe": content}})
        return made, said

    return make


def opened(made: Resident, ask: Any = None) -> dict[str, Any]:
    names = [f"site-{number}" for number in range(4)]
    labels = ["animal", "food", "place"]
    said = (ask or made.handle)({"kind": "open", "run": RUN, "values": {"names": names, "labels": labels}})
    return dict(said)


def work(made: Resident, tmp_path: Path, number: int = 1, ask: Any = None) -> dict[str, Any]:
    assert made.participant is not None
    state = made.participant.method.initialise()
    task = made.participant.method.configure(state, number, {"site-1": Work(epochs=1)})["site-1"]
    body = tmp_path / "in.safetensors"
    safetensors.torch.save_file(task.tensors, body)
    said = (ask or made.handle)(
        {
            "kind": "work", "run": RUN, "task": task.kind, "round": number, "values": values_of(task),
            "body": str(body),
        }
    )  # fmt: skip
    return dict(said)


class FakeBridge:
    """The local connection: keeps what was sent, and is cut when it is told to be."""

    def __init__(self, made: Resident) -> None:
        self.made, self.sent, self.cut = made, list[dict[str, Any]](), False

    def send(self, reply: dict[str, Any]) -> None:
        if self.cut:
            raise BridgeError("the job has ended")
        self.sent.append(reply)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.made.answer(self, message)  # type: ignore[arg-type]
        return self.sent[-1]


def test_a_recipe_is_refused_before_its_model_is_looked_for(
    resident: Any, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a recipe that leaves out its remedies for label skew would have the site do."""
    read: list[str] = []
    monkeypatch.setattr(
        "fedcustom.models.configuration._configuration",
        lambda base, revision: read.append(base) or BertConfig(),
    )
    monkeypatch.setattr(
        "fedcustom.models.configuration.find_pooling",
        lambda model, path: read.append(path) or Pooling("mean", True),
    )
    made, _ = resident(base_models=["allowed"])
    read.clear()  # of the server's completing a recipe
    content = {**small, "rounds": {"count": 9}, "model": {"base": "hub/other"}}
    for model in ({"base": "hub/other"}, {"base": "allowed", "trust_remote_code": True}):
        said = made.handle(
            {"kind": "describe", "run": RUN, "values": {"recipe": {**content, "model": model}}}
        )
        assert "base_models" in str(said) or "trust_remote_code" in str(said)
    assert not read
    made.handle(
        {"kind": "describe", "run": RUN, "values": {"recipe": {**content, "model": {"base": "allowed"}}}}
    )
    assert set(read) == {"allowed"}


def test_all_exchanges_of_a_fit_are_one_round(resident: Any, small: dict[str, Any], tmp_path: Path) -> None:
    """A site that answers one round takes part in a whole fit of the head, and in nothing after it."""
    small["training"] |= {"fit_head_rounds": [1], "fit_head_steps": 9}
    made, _ = resident(max_rounds=1)
    named = {"names": ["site-1", "site-2"], "labels": ["animal", "food", "place"]}
    made.handle({"kind": "open", "run": RUN, "values": named})
    method, kinds = made.participant.method, []
    state = method.initialise()
    while not kinds or "unfinished" in state.values:
        task = method.configure(state, 1, {"site-1": Work(epochs=1)})["site-1"]
        kinds.append(task.kind)
        safetensors.torch.save_file(task.tensors, tmp_path / "in.safetensors")
        message = {"kind": "work", "run": RUN, "task": task.kind, "round": 1, "values": values_of(task)}
        answer = made.handle({**message, "body": str(tmp_path / "in.safetensors")})
        tensors = safetensors.torch.load_file(answer["body"])
        update = read_update(method.messages, task, answer["values"], tensors)
        method.check(task, update)
        state = method.aggregate(state, iter([Answer("site-1", task, update)])).state
    assert kinds[:3] == ["fit head", "scale head", "head gradient"]
    assert len(kinds) > 5
    assert "policy.max_rounds = 1" in str(work(made, tmp_path, 2))


def test_every_message_is_in_the_audit_log_with_its_hash(resident: Any, tmp_path: Path) -> None:
    made, said = resident()
    assert said["values"] == {"labels": ["animal", "food", "place"], "rows": 40}
    bridge = FakeBridge(made)
    assert opened(made, bridge.ask)["values"]["sizes"] == {"train": 32, "development": 4, "test": 4}
    answer = work(made, tmp_path, ask=bridge.ask)
    log = [json.loads(line) for line in (tmp_path / "own" / "audit.jsonl").read_text().splitlines()]
    events = [(event["event"], event.get("kind")) for event in log]
    assert events == [
        ("started", None), ("base model loaded", None), ("sent", "open"), ("sent", "work"),
    ]  # fmt: skip
    text = json.dumps(answer["values"], sort_keys=True, ensure_ascii=False)
    expected = hashlib.sha256(text.encode() + Path(answer["body"]).read_bytes()).hexdigest()
    assert log[-1]["sha256"] == expected
    assert log[-1]["bytes"] == answer["bytes"]
    assert "cat" not in (tmp_path / "own" / "audit.jsonl").read_text(), "no word of the data"
    bridge.cut = True
    with pytest.raises(BridgeError):
        work(made, tmp_path, 2, bridge.ask)
    last = [json.loads(line) for line in (tmp_path / "own" / "audit.jsonl").read_text().splitlines()][-2:]
    assert [(event["event"], event["sha256"] == last[0]["sha256"]) for event in last] == [
        ("sent", True), ("not sent", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "retrieve"}, "task 'retrieve': the run's method has no such task"),
        ({"task": None}, "a message names no task"),
        ({"values": {"round": 1}}, "task 'train': learning_rate_factor is missing"),
        ({"values": {"round": True, "learning_rate_factor": 1.0}}, "task 'train': round: "),
        ({"values": {"round": 1, "learning_rate_factor": 1.0, "path": "/"}}, "unknown key 'path'"),
    ],
)
def test_a_task_that_does_not_pass_is_refused_before_anything_else(
    resident: Any, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    """Its tensors are not read, and no version of the memory is deleted."""
    made, _ = resident()
    opened(made)
    work(made, tmp_path)
    assert made.participant is not None
    message = {
        "kind": "work", "run": RUN, "task": "train", "round": 1, "keep": [9], "body": "/no/such/file",
        "values": {"round": 1, "learning_rate_factor": 1.0},
    }  # fmt: skip
    assert reason in made.handle({**message, **change})["error"]
    assert made.participant.memory.after(1).values["examples_seen"] == 32


def test_a_restarted_site_goes_on_with_its_memory(resident: Any, tmp_path: Path) -> None:
    made, _ = resident()
    opened(made)
    work(made, tmp_path, 1)
    expected = work(made, tmp_path, 2)
    tensors = safetensors.torch.load_file(expected["body"])
    again = Resident(made.name, made.settings, made.runs.base, made.folder)
    body = tmp_path / "in.safetensors"
    message = {"kind": "work", "run": RUN, "task": "train", "round": 2, "body": str(body)}
    assert made.participant is not None
    state = made.participant.method.initialise()
    task = made.participant.method.configure(state, 2, {"site-1": Work(epochs=1)})["site-1"]
    said = again.handle({**message, "values": values_of(task)})
    assert said["values"] == expected["values"]
    found = safetensors.torch.load_file(said["body"])
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"methods": ["lora"]}, "policy.methods"),
        ({"max_rounds": 0}, "policy.max_rounds"),
        ({"max_message_megabytes": 0.001}, "policy.max_message_megabytes"),
        ({"evaluate": False}, "policy.evaluate"),
    ],
)
def test_a_refusal_is_told_and_logged(resident: Any, tmp_path: Path, policy: Any, reason: str) -> None:
    made, said = resident(**policy)
    if "refused" not in said:
        said = opened(made)
        assert "refused" not in said, said
        said = (
            made.handle({"kind": "evaluate", "run": RUN, "part": "test", "after": 0, "values": {}})
            if "evaluate" in policy
            else work(made, tmp_path)
        )
    assert said["refused"].startswith(reason)
    last = json.loads((tmp_path / "own" / "audit.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"]) == ("refused", said["refused"])


def test_only_the_kind_of_a_failure_is_told(resident: Any, tmp_path: Path, monkeypatch: Any) -> None:
    made, _ = resident()
    opened(made)

    def fail(*_: Any) -> None:
        raise RuntimeError("patient 17 has gout")

    assert made.participant is not None
    monkeypatch.setattr(made.participant.method, "execute", fail)
    assert work(made, tmp_path) == {"error": "RuntimeError"}
    assert "patient 17" in (tmp_path / "own" / "errors.log").read_text()


# --- the local connection ---


def test_only_who_knows_the_key_gets_in(tmp_path: Path) -> None:
    listener = BridgeListener(tmp_path / "bridge.json")
    assert (tmp_path / "bridge.json").stat().st_mode & 0o777 == 0o600
    got: list[Any] = []

    def serve() -> None:
        bridge = listener.accept()
        got.append(bridge.receive(5.0))
        bridge.send({"answer": 2})

    thread = threading.Thread(target=serve)
    thread.start()
    content = json.loads((tmp_path / "bridge.json").read_text())
    (tmp_path / "wrong.json").write_text(json.dumps({**content, "key": "00" * 32}))
    with pytest.raises(BridgeError):
        connect(tmp_path / "wrong.json")
    bridge = connect(tmp_path / "bridge.json")
    bridge.send({"question": 1})
    assert bridge.receive(5.0) == {"answer": 2}
    thread.join()
    assert got == [{"question": 1}]
    with pytest.raises(BridgeError):
        bridge.receive(5.0)
    listener.close()
    with pytest.raises(BridgeError):
        connect(tmp_path / "bridge.json")


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcustom.deployment.nvflare.kits import require_nvflare

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FedcustomError, match=r"pip install 'fedcustom\[deploy\]'"):
        require_nvflare()


def test_parked_tensors_are_the_same_and_keep_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300, 40), "b": torch.arange(5).to(torch.bfloat16)}
    mapped = parked(tensors, tmp_path)
    assert equal(mapped, tensors)
    assert not list(tmp_path.iterdir())
    mapped["a"][3] = 7.0
    leave_memory(mapped)
    tensors["a"][3] = 7.0
    assert equal(mapped, tensors)


# --- what a hostile server or neighbour tries ---


@pytest.mark.parametrize("run", ["/elsewhere", "../../x", "abc", "0123456789ABCDEF", ""])
def test_a_run_is_no_path(resident: Any, tmp_path: Path, run: str) -> None:
    made, _ = resident()
    opened(made)
    before = {path for path in tmp_path.rglob("*") if path.is_dir()}
    for kind in ("describe", "open", "work", "evaluate"):
        said = made.handle({"kind": kind, "run": run, "values": {"recipe": {}}})
        assert "error" in said
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == before


def test_texts_are_not_labels() -> None:
    long = "a rather long name of a label with far more than twelve words in it all"
    check_labels(["animal", "food"], most=2, longest_words=12)
    check_labels([long], most=1, longest_words=None)
    for labels in ([long], ["x" * 101], ["a", "b", "c"]):
        with pytest.raises(PolicyError):
            check_labels(labels, most=2, longest_words=12)
    with pytest.raises(PolicyError, match="more than 100 characters"):
        check_labels(["x" * 101], most=MAX_LABELS, longest_words=None)


def test_work_goes_to_the_run_that_is_open(resident: Any, tmp_path: Path) -> None:
    made, _ = resident()
    opened(made)
    content = json.loads(made.participant.recipe.model_dump_json(exclude_none=True))
    other = "f" * 16
    assert "values" in made.handle({"kind": "describe", "run": other, "values": {"recipe": content}})
    said = made.handle({"kind": "work", "run": other, "task": "train", "round": 1, "values": {}})
    assert said == {"error": "WireError"} or "not open" in said["error"]
    assert "values" in work(made, tmp_path), "the run that is open goes on"


def test_every_model_of_a_recipe_is_looked_at() -> None:
    recipe = load_recipe(
        {"method": {"name": "distillation", "client_models": ["/models/a", "/models/b"]},
         "model": {"base": "/models/a"}, "data": {"source": "."}, "public": {"source": "."}}
    )  # fmt: skip
    gives = {"logits": True}
    check_recipe(PolicySettings(base_models=["/models/a", "/models/b"], **gives), recipe)
    with pytest.raises(PolicyError, match="/models/b"):
        check_recipe(PolicySettings(base_models=["/models/a"], **gives), recipe)
    pinned = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": "v2"})})
    check_recipe(PolicySettings(base_models=["/models/a@v2", "/models/a", "/models/b"], **gives), pinned)
    with pytest.raises(PolicyError, match="'/models/a@v2' is not allowed"):
        check_recipe(PolicySettings(base_models=["/models/a", "/models/b"], **gives), pinned)


def test_sums_of_sites_are_pooled() -> None:
    parts = [mean_statistics({"loss": 2.0, "bleu": 10.0}, {"loss": 30}, 3),
             mean_statistics({"loss": 1.0, "bleu": 40.0}, {"loss": 10}, 1)]  # fmt: skip
    checked = [check_statistics(json.loads(json.dumps(part)), 0) for part in parts]
    assert pooled_metrics(checked) == pytest.approx({"loss": (60 + 10) / 40, "bleu": (30 + 40) / 4})


@pytest.mark.parametrize(
    "part",
    [
        {"examples": 0, "sums": {}},
        {"examples": 2, "sums": {"loss": [10**400, 1]}},
        {"examples": 2, "sums": {"loss": 1.0}},
        {"examples": 2, "sums": {"loss": [float("nan"), 1]}},
        {"examples": 2, "sums": {"loss": [1.0, 0]}},
    ],
)
def test_unsound_statistics_are_refused(part: dict[str, Any]) -> None:
    with pytest.raises(UpdateError):
        check_statistics(part, 0)


@pytest.mark.parametrize("text", ["[1]", "{", "7", None, 7, "[" * 100_000, " " * (MAX_HEAD_LENGTH + 1)])
def test_a_head_is_an_object(text: Any) -> None:
    with pytest.raises(WireError):
        read_json(text, MAX_HEAD_LENGTH)
    assert read_json('{"values": {}}', MAX_HEAD_LENGTH) == {"values": {}}


def test_garbage_at_the_listener_does_not_block_the_next_connection(tmp_path: Path) -> None:
    listener = BridgeListener(tmp_path / "bridge.json")
    content = json.loads((tmp_path / "bridge.json").read_text())
    folder = Path(content["address"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(listener.accept().receive(5.0)))
    thread.start()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(content["address"])
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    bridge = connect(tmp_path / "bridge.json")
    bridge.send({"question": 1})
    thread.join(10)
    assert got == [{"question": 1}]
    listener.close()
    assert not folder.exists()


def test_a_kit_gives_nobody_code_or_files(tmp_path: Path) -> None:
    provision(tmp_path / "f", "localhost", 8123, ["north", "south"])
    for kit, allowed in [("server", CONTROLLER), ("sites/north", EXECUTOR), ("sites/south", EXECUTOR)]:
        local = tmp_path / "f" / kit / "local"
        permissions = json.loads((local / "authorization.json").read_text())["permissions"]
        assert set(permissions) == {"project_admin", "org_admin", "lead", "member"}
        for role, rights in permissions.items():
            for right in ("byoc", "shell_commands", "operate", "download_job", "clone_job"):
                assert rights[right] == "none"
            assert (rights["submit_job"] == "any") == (role == "lead")
        assert json.loads((local / "resources.json").read_text())["class_allow_list"] == [allowed]


def test_a_held_file_is_held_once_and_let_go_by_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "run.pid"
    assert holder(file) is None
    with held(file) as alone:
        assert alone
        assert holder(file) == os.getpid()
        with held(file) as second:
            assert not second
    assert holder(file) is None
    script = f"""
import time
from pathlib import Path
from fedcustom.core.files import held
with held(Path({str(file)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    assert holder(file) == other.pid
    other.kill()
    other.wait()
    assert holder(file) is None, "whatever number is written there"


def test_a_run_keeps_its_identifier_with_its_directory(tmp_path: Path) -> None:
    assert len({run_id(tmp_path), run_id(tmp_path)}) == 2, "drawn anew until there is a checkpoint"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / RUN_FILE).write_text(RUN)
    (tmp_path / "old").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == RUN
