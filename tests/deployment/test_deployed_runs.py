"""Runs across sites over the real engine on loopback: the same result as in process, and what faults cost."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import fedcustom
from fedcustom.core.errors import DeploymentError
from fedcustom.deployment.run import serving
from fedcustom.deployment.settings import load_federation
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.methods import Update
from fedcustom.recipe.recipe import load_recipe, to_toml
from fedcustom.updates.transform import ClientContext, UpdateTransform
from helpers.deployed import Bed, Watcher, bed, command, hostile, kill, metrics
from helpers.keys import knock

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]

ROUNDS = 6


@pytest.fixture(scope="module")
def recipe(tiny: dict[str, str], data_folder: Path) -> dict[str, Any]:
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(data_folder), "max_length": 24},
        "clients": {"partition": "iid", "count": 3},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8, "cohort_width": 1, "local_steps": 3},
        "rounds": {"count": ROUNDS},
        # One example a batch: sites score their own examples, the simulation all clients' together, and a
        # product's rounding depends on how many rows it has.
        "evaluation": {"batch_size": 1, "select": "last"},
    }


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Iterator[Bed]:
    with bed(tmp_path_factory.mktemp("federation") / "f", recipe) as made:
        yield made


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, recipe: dict[str, Any]) -> Any:
    """The same run in process."""
    out = tmp_path_factory.mktemp("expected") / "run"
    fedcustom.run(recipe, out=out)
    return out


def final(out: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(out / "checkpoints")
    return dict(checkpoints.load(checkpoints.rounds()[-1]).state.tensors)


def difference(a: Path, b: Path) -> float:
    first, second = final(a), final(b)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def report(record: Any, lost: str, seconds: float) -> None:
    """What a fault cost, for the table in docs/deployment.md."""
    record("lost", lost)
    record("seconds", f"{seconds:.1f}")
    print(f"lost: {lost}; recovered after {seconds:.1f} s")


def longest(watcher: Watcher) -> float:
    """The longest time between the ends of two rounds."""
    times = [watcher.times[number] for number in sorted(watcher.times)]
    return max(b - a for a, b in pairwise(times))


def test_a_deployed_run_is_the_run_in_process(federation: Bed, expected: Path, tmp_path: Path) -> None:
    summary = federation.run(tmp_path / "run")
    assert difference(tmp_path / "run", expected) == 0
    there = fedcustom.load(expected).summary
    assert summary["metrics"] == pytest.approx(there["metrics"], abs=1e-9)
    assert summary["clients"] == {n: pytest.approx(v, abs=1e-9) for n, v in there["clients"].items()}
    for mine, other in zip(metrics(tmp_path / "run"), metrics(expected), strict=True):
        assert mine.get("development") == pytest.approx(other.get("development"), abs=1e-9)
        assert mine["round"] == other["round"]
        if mine["round"]:
            assert mine["answered"] == other["answered"]
            # a client's seconds of training are not among its values, so that lengths agree but for digits
            assert mine["bytes_down"] == other["bytes_down"]
            assert all(abs(mine["bytes_up"][n] - other["bytes_up"][n]) <= 4 for n in mine["bytes_up"])


def test_the_base_model_is_loaded_once_and_every_message_is_logged(federation: Bed, tmp_path: Path) -> None:
    before = {name: len(federation.audit(name)) for name in federation.names}
    federation.run(tmp_path / "run", rounds__count=20, training__local_steps=1)
    rows = [row for row in metrics(tmp_path / "run") if row["round"]]
    for name in federation.names:
        events = federation.audit(name)[before[name] :]
        assert [event["event"] for event in events].count("base model loaded") == 1
        sent = [event for event in events if event["event"] == "sent" and event["kind"] == "work"]
        assert all(len(event["sha256"]) == 64 for event in sent)
        rounds = {n: [event for event in sent if event["round"] == n] for n in range(1, 21)}
        assert [event["round"] for event in sent] == [n for n, of in rounds.items() for _ in of], "in order"
        for row, of in zip(rows, rounds.values(), strict=True):
            assert sum(event["bytes"] for event in of) == row["bytes_up"][name]
        keys = [[event["keys"] for event in of] for of in rounds.values()]
        for fit in keys[0], keys[19]:  # sums, the scale of their head, then the steps of the regression
            assert fit[:2] == [["weight"]] * 2
            assert len(fit) > 2
            assert all(each == ["objective", "weight"] for each in fit[2:])
        assert all(each == [["examples", "loss", "steps", "weight"]] for each in keys[1:19])


@pytest.mark.parametrize(("process", "site", "when"), [("job", 1, 2), ("resident", 0, 3)])
def test_a_sites_process_killed_in_a_round(
    federation: Bed, expected: Path, tmp_path: Path, record_property: Any, process: str, site: int, when: int
) -> None:
    name = federation.names[site]
    watcher = Watcher({when: lambda: kill(getattr(federation, process)(name))})
    federation.run(tmp_path / "run", watcher)
    assert difference(tmp_path / "run", expected) == 0
    report(record_property, "nothing", longest(watcher))


def test_a_sites_engine_killed(federation: Bed, expected: Path, tmp_path: Path, record_property: Any) -> None:
    """It registers again, and the server's job does not notice by itself."""
    name = federation.names[2]
    watcher = Watcher({2: lambda: kill(federation.engine(name))})
    federation.patience(grace_seconds=100.0, round_seconds=600.0)
    try:
        federation.run(tmp_path / "run", watcher)
    finally:
        federation.patience(grace_seconds=12.0, round_seconds=120.0)
    assert longest(watcher) < 120.0
    assert any(f"{name} registered again" in note for note in watcher.notes)
    assert [row["left_out"] for row in metrics(tmp_path / "run") if row["round"]] == [{}] * ROUNDS
    assert difference(tmp_path / "run", expected) == 0
    report(record_property, "nothing", longest(watcher))


def test_the_servers_engine_killed(
    federation: Bed, expected: Path, tmp_path: Path, record_property: Any
) -> None:
    watcher = Watcher({2: lambda: kill(federation.server())})
    federation.run(tmp_path / "run", watcher)
    assert difference(tmp_path / "run", expected) == 0
    assert any("engine ended" in note for note in watcher.notes)
    report(record_property, "nothing", longest(watcher))


def test_the_run_killed_and_resumed(federation: Bed, tmp_path: Path, record_property: Any) -> None:
    out, file, rounds = tmp_path / "run", tmp_path / "recipe.toml", 15
    recipe = load_recipe(federation.recipe, {"rounds.count": rounds})
    file.write_text(to_toml(recipe))
    process = command("deploy", "run", str(file), "-f", str(federation.folder), "--out", str(out))
    until = time.monotonic() + 120
    while time.monotonic() < until and not ((out / "metrics.jsonl").exists() and len(metrics(out)) > 3):
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.02)
    kill([process.pid])
    process.wait()
    killed = time.monotonic()
    watcher = Watcher()
    federation.run(out, watcher, rounds__count=rounds)
    assert 2 <= watcher.done < rounds  # the third round may lack its checkpoint
    assert [row["round"] for row in metrics(out)] == [0, *range(1, rounds + 1)]
    fedcustom.run(recipe, out=tmp_path / "expected")
    assert difference(out, tmp_path / "expected") == 0
    report(record_property, "nothing", watcher.times[watcher.done + 1] - killed)


def test_a_site_whose_rows_changed_takes_no_part_until_it_accepts(federation: Bed, tmp_path: Path) -> None:
    """The server learns that they changed, and no more; the site's console says what."""
    name, out = federation.names[0], tmp_path / "run"
    rows = federation.kit(name) / "data" / "train.jsonl"
    before, log = rows.read_text(), federation.own(name) / "site.log"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(out, Watcher({2: stop}))
    try:
        rows.write_text("".join(before.splitlines(keepends=True)[1:]))
        told = "the site's data changed since the run began"
        with pytest.raises(
            DeploymentError, match=f"2 of 3 sites take part, 3 are needed; {name}: refused: {told}$"
        ):
            federation.run(out)
        said = " ".join(log.read_text().split())
        assert "train: 1 removed (" in said
        assert "--data-changed=accept" in said
        federation.kill_site(name)
        federation.start(name, options=["--data-changed=accept"])
        summary = federation.run(out)
    finally:
        rows.write_text(before)
        federation.kill_site(name)
        federation.start(name)
    assert summary["rounds"] == ROUNDS
    assert summary["clients"][name]["examples"] == len(before.splitlines()) - 1
    events = [event for event in federation.audit(name) if event["event"] == "data changed"]
    assert [event["accepted"] for event in events] == [False, True]


def test_a_site_dies_for_good_and_another_day_comes_back(
    federation: Bed, tmp_path: Path, record_property: Any
) -> None:
    name = federation.names[2]
    watcher = Watcher({2: lambda: federation.kill_site(name), 4: lambda: federation.start_and_wait(name)})
    federation.run(tmp_path / "run", watcher, rounds__count=9)
    rows = [row for row in metrics(tmp_path / "run") if row["round"]]
    missed = [row["round"] for row in rows if name in row["left_out"]]
    assert missed[0] == 3, "the round in which it died closes without it"
    assert missed == list(range(3, 3 + len(missed))), "missed rounds are those while it was away"
    assert rows[-1]["answered"] == federation.names, "it takes part again"
    assert all(set(federation.names) - {name} <= set(row["answered"]) for row in rows)
    report(record_property, f"its answers in {len(missed)} rounds", watcher.times[3] - watcher.times[2])


def test_a_slow_site_does_not_hold_up_the_round(
    federation: Bed, tmp_path: Path, record_property: Any
) -> None:
    name = federation.names[0]
    watcher = Watcher(
        {
            2: lambda: kill(federation.resident(name), signal.SIGSTOP),
            4: lambda: kill(federation.resident(name), signal.SIGCONT),
        }
    )
    federation.patience(round_seconds=6.0)
    try:
        federation.run(tmp_path / "run", watcher, rounds__count=8)
    finally:
        if running := federation.resident(name):
            kill(running, signal.SIGCONT)
        federation.patience(round_seconds=120.0)
    rows = [row for row in metrics(tmp_path / "run") if row["round"]]
    assert rows[2]["left_out"] == {name: "no answer in time"}
    assert rows[2]["answered"] == [n for n in federation.names if n != name]
    assert rows[-1]["answered"] == federation.names
    report(record_property, "its answers while it was stopped", watcher.times[3] - watcher.times[2])


def test_a_site_that_joins_late(tmp_path: Path, recipe: dict[str, Any], record_property: Any) -> None:
    with bed(tmp_path / "f", recipe, start=False) as made:
        first, late = made.names[:2], made.names[2]
        made.patience(start_with=2, grace_seconds=3.0)
        made.start(*first)
        joined: list[float] = []

        def join() -> None:
            joined.append(time.monotonic())
            made.start_and_wait(late)

        watcher = Watcher({1: join})
        made.run(tmp_path / "run", watcher, rounds__count=6)
        rows = [row for row in metrics(tmp_path / "run") if row["round"]]
        assert late in rows[0]["left_out"]
        assert rows[-1]["answered"] == made.names
        came = next(row["round"] for row in rows if late in row["answered"])
        report(record_property, "nothing", watcher.times[came] - joined[0])


def test_too_few_sites_is_an_error_and_nothing_is_lost(federation: Bed, tmp_path: Path) -> None:
    from fedcustom.core.errors import FedcustomError

    name = federation.names[1]
    federation.patience(quorum_seconds=75.0, grace_seconds=2.0)  # in which a job must start, too
    out = tmp_path / "run"
    try:
        with pytest.raises(FedcustomError, match=r"2 of 3 clients answered, rounds.min_clients = 3"):
            federation.run(out, Watcher({3: lambda: federation.kill_site(name)}), rounds__min_clients=3)
    finally:
        federation.patience(quorum_seconds=120.0, grace_seconds=12.0)
    assert [row["round"] for row in metrics(out)] == [0, 1, 2, 3]
    federation.start(name)
    federation.run(out, rounds__min_clients=3)
    assert [row["round"] for row in metrics(out)] == [0, *range(1, ROUNDS + 1)]


def test_a_hostile_site_is_left_out_and_the_others_go_on(
    tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, a wrong shape, 10 GB, a truncated message, no values, an impossible weight, too many steps."""

    def spoiled(change: Any) -> Any:
        def trick(answer: dict[str, Any]) -> None:
            tensors = safetensors.torch.load_file(answer["body"])
            safetensors.torch.save_file(change(tensors), answer["body"])

        return trick

    def first(tensors: dict[str, Any], new: Any) -> dict[str, Any]:
        name = sorted(tensors)[0]
        return {**{n: t.clone() for n, t in tensors.items()}, name: new(tensors[name])}

    def ten_gigabytes(answer: dict[str, Any]) -> None:
        with open(answer["body"], "r+b") as file:
            file.truncate(10 * 2**30)  # a hole: it takes no space here, and would there

    def truncated(answer: dict[str, Any]) -> None:
        with open(answer["body"], "r+b") as file:
            file.truncate(1000)

    tricks = {
        2: spoiled(lambda ts: first(ts, lambda t: t * float("nan"))),
        3: spoiled(lambda ts: first(ts, lambda t: t.flatten()[:-1].clone())),
        4: ten_gigabytes,
        5: truncated,
        6: lambda answer: answer.update(values=[]),
        7: lambda answer: answer["values"].update(weight=1e30),
        8: lambda answer: answer["values"].update(steps=10**9),
    }
    reasons = {
        2: "finite", 3: "shape", 4: "a message of 10737418240 bytes; at most 50000000 are allowed",
        5: "malformed", 6: "an answer without values", 7: "weight", 8: "steps",
    }  # fmt: skip
    with bed(tmp_path / "f", recipe, start=False) as made:
        made.patience(max_message_megabytes=50.0)
        bad = made.names[1]
        made.start(made.names[0], made.names[2])
        with hostile(made, bad, tricks):
            made.run(tmp_path / "run", rounds__count=9)
    rows = [row for row in metrics(tmp_path / "run") if row["round"]]
    for row in rows[1:8]:
        assert reasons[row["round"]] in row["left_out"][bad], row["left_out"]
        assert row["answered"] == [name for name in made.names if name != bad]

    class Refuse(UpdateTransform):
        def on_client(self, update: Update, context: ClientContext) -> Update:
            if context.client == bad and 1 < context.round_number < 9:
                raise ValueError("left out")
            return update

    monkeypatch.setattr("fedcustom.federated.simulation.simulated_attack", lambda *_: [Refuse()])
    fedcustom.run(recipe, {"rounds.count": 9}, out=tmp_path / "expected")
    assert difference(tmp_path / "run", tmp_path / "expected") == 0


def test_who_has_no_valid_certificate_is_turned_away(tmp_path: Path, recipe: dict[str, Any]) -> None:
    with bed(tmp_path / "f", recipe, start=False) as made, bed(tmp_path / "g", recipe, start=False) as other:
        settings = load_federation(made.folder)
        kit = made.kit(made.names[0]) / "startup"
        good = (kit / "client.crt", kit / "client.key")
        stranger = other.kit(made.names[0]) / "startup"
        with serving(made.folder, settings, print):
            until = time.monotonic() + 60
            while time.monotonic() < until and not can_connect(settings.port):
                time.sleep(0.2)
            assert knock(settings.port, kit / "rootCA.pem", *good) == "let in"
            foreign = (stranger / "client.crt", stranger / "client.key")
            assert "unknown ca" in knock(settings.port, kit / "rootCA.pem", *foreign).lower()
            late = expired(made.folder, tmp_path)
            assert "expired" in knock(settings.port, kit / "rootCA.pem", *late).lower()
            assert "certificate required" in knock(settings.port, kit / "rootCA.pem").lower()
            assert not in_plain_text(settings.port)


def in_plain_text(port: int) -> bytes:
    """What the server says to one who speaks without TLS, alerts apart."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"hello, this is not TLS\r\n" * 10)
        try:
            said = plain.recv(100)
        except ConnectionResetError:
            return b""
    return b"" if said.startswith(b"\x15\x03") else said  # a TLS alert


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def expired(folder: Path, to: Path) -> tuple[Path, Path]:
    """A certificate that the federation's authority signed, and that ran out yesterday."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    state = json.loads((folder / "authority" / "cert.json").read_text())
    authority = x509.load_pem_x509_certificate(state["root_cert"].encode())
    signer = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    kit = next((folder / "sites").iterdir()) / "startup"
    old = x509.load_pem_x509_certificate((kit / "client.crt").read_bytes())
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=9)).not_valid_after(now - timedelta(days=1))
    assert authority.subject == old.issuer
    made = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    (to / "expired.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return to / "expired.crt", kit / "client.key"
