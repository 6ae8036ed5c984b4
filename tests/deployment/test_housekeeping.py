"""Bounds of what a long run leaves: threads, logs, folders of jobs, sockets, tensors on their way."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcustom.deployment.nvflare import bridge
from fedcustom.deployment.nvflare.bridge import (
    ADDRESS_VARIABLE,
    LIMIT_VARIABLE,
    BridgeListener,
    connect,
    remove_stale_folders,
)
from fedcustom.deployment.nvflare.executor import MAX_BYTES, STALE_AFTER, SiteExecutor, remove_stale
from fedcustom.deployment.nvflare.housekeeping import Housekeeping, limit_job_folders, limit_log
from fedcustom.deployment.nvflare.streams import SharedTimers, share_stream_timers
from fedcustom.deployment.nvflare.supervision import SupervisedProcess, keep_alive

# --- threads ---


def test_a_thousand_timers_have_one_thread() -> None:
    timers, fired, before = SharedTimers(), list[int](), threading.active_count()
    for number in range(1000):
        timers.call_later(0.5, lambda number=number: fired.append(number))
    assert threading.active_count() <= before + 1
    until = time.monotonic() + 10.0
    while len(fired) < 1000 and time.monotonic() < until:
        time.sleep(0.01)
    assert fired == list(range(1000)), "in the order in which they were due"
    time.sleep(0.2)
    assert threading.active_count() <= before, "no thread is left without timers"


def test_timers_are_cancelled_and_errors_end_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    timers, fired = SharedTimers(), threading.Event()
    timers.call_later(0.05, fired.set).cancel()
    timers.call_later(0.06, lambda: 1 / 0)
    last = threading.Event()
    timers.call_later(0.2, last.set)
    timers.call_later(0.0, lambda: None)  # due before those that are waited for
    assert last.wait(5.0)
    assert not fired.is_set()
    assert [error.exc_type for error in errors] == [ZeroDivisionError]


def test_received_streams_of_the_engine_share_a_thread() -> None:
    """In a process of its own: the engine's class is changed."""
    script = """
import threading
from fedcustom.deployment.nvflare.streams import share_stream_timers
from nvflare.fuel.f3.streaming.byte_receiver import RxTask
assert share_stream_timers() and share_stream_timers()
before = threading.active_count()
tasks = []
for number in range(200):
    task = RxTask(number, "server", None, reliable=True)
    RxTask.rx_task_map["server", number] = task
    task.completed_task_ttl = 0.5
    task.stop()
    task.stop()
    tasks.append(task)
print(threading.active_count() - before, len(RxTask.rx_task_map))
tasks[0]._remove_task()
threading.Event().wait(1.5)
print(threading.active_count() - before, len(RxTask.rx_task_map))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-2:] == ["1 200", "0 0"]


def test_an_engine_that_keeps_its_streams_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvflare.fuel.f3.streaming import byte_receiver

    class Other:
        def _schedule_remove_task(self) -> None: ...

    monkeypatch.setattr(byte_receiver, "RxTask", Other)
    original = Other._schedule_remove_task
    assert not share_stream_timers()
    assert Other._schedule_remove_task is original
    monkeypatch.setattr(byte_receiver, "RxTask", SimpleNamespace())
    assert not share_stream_timers()


# --- logs ---


def test_a_log_is_cut_to_its_newest_half(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    lines = [f"line {number:05}\n" for number in range(1000)]  # eleven bytes each
    with log.open("a") as writer:
        writer.writelines(lines[:-1])
        writer.flush()
        assert not limit_log(log, 11 * 999)
        writer.write(lines[-1])
        writer.flush()
        assert limit_log(log, 11 * 999)
        assert log.read_bytes() == b""
        kept = (tmp_path / "engine.log.1").read_text()
        assert kept == "".join(lines[501:]), "whole lines, half of what is allowed"
        writer.write("afterwards\n")
    assert log.read_text() == "afterwards\n", "its writer has the same file open"
    assert not limit_log(tmp_path / "missing.log")


def test_the_log_of_a_supervised_process_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_log, "__defaults__", (10_000,))
    script = (
        "import time\nfor _ in range(400):\n print('x' * 99, flush=True)\n time.sleep(5e-3)\ntime.sleep(60)"
    )
    process = SupervisedProcess([sys.executable, "-c", script], tmp_path / "p.log")
    until, largest = time.monotonic() + 4.0, [0]

    def stopped() -> bool:
        if process.log.exists():
            largest[0] = max(largest[0], process.log.stat().st_size)
        return time.monotonic() > until

    assert keep_alive([process], lambda _: None, stopped)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0 < total < 25_000, "of 40,000 bytes"
    assert largest[0] < 20_000


def test_a_jobs_own_logs_are_bounded(tmp_path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(tmp_path / "log.txt", maxBytes=2**30, backupCount=10)
    logging.getLogger().addHandler(handler)
    try:
        Housekeeping(tmp_path, "0" * 8)
        assert (handler.maxBytes, handler.backupCount) == (8 * 2**20, 1)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


# --- folders of jobs ---


def job_name(number: int) -> str:
    return f"{number:08x}-0000-0000-0000-000000000000"


def test_the_newest_jobs_are_kept(tmp_path: Path) -> None:
    for number in range(15):
        for parent in (tmp_path, tmp_path / "jobs"):
            folder = parent / job_name(number)
            (folder / "app").mkdir(parents=True)
            os.utime(folder, (number, number))
    for other in ("local", "startup", "fedcustom", "jobs/9ca8", "0" * 36):
        (tmp_path / other).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / job_name(99)).symlink_to(tmp_path / "elsewhere")
    removed = limit_job_folders(tmp_path, running=job_name(0), most=10)
    assert sorted(removed) == sorted([job_name(number) for number in range(1, 6)] * 2)
    names = {path.name for path in tmp_path.iterdir()}
    kept = {job_name(number) for number in (0, *range(6, 15))}
    assert names == kept | {"local", "startup", "fedcustom", "jobs", "0" * 36, "elsewhere", job_name(99)}
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == kept | {"9ca8"}
    assert limit_job_folders(tmp_path / "missing", running="") == []


# --- tensors on their way ---


def test_what_dead_jobs_left_in_the_spool_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = time.time() - STALE_AFTER - 10.0
    for name, when in [
        (f"{os.getpid()}-a.in", old), (f"{dead.pid}-b.in", old), (f"{dead.pid}-c.in", time.time()),
        ("0123.in", old), ("d.out", time.time()), ("e.other", old),
    ]:  # fmt: skip
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{os.getpid()}-a.in",
        f"{dead.pid}-c.in",
        "e.other",
    }


# --- sockets ---

LISTEN = """
import sys, time
from pathlib import Path
from fedcustom.deployment.nvflare.bridge import BridgeListener
listener = BridgeListener(Path(sys.argv[1]))
print("listening", flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The system's temporary folder, with a short path and for this test alone."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
    monkeypatch.setattr(tempfile, "tempdir", None)


def killed_listener(file: Path) -> None:
    """A process that listened, and was killed."""
    process = subprocess.Popen([sys.executable, "-c", LISTEN, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()


def exchange(listener: BridgeListener) -> None:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(listener.accept().receive(5.0)))
    thread.start()
    connect(listener.file).send({"question": 1})
    thread.join(10.0)
    assert got == [{"question": 1}]


@pytest.mark.parametrize("long", [False, True])
def test_killed_listeners_leave_no_folders(temporary: Path, tmp_path: Path, long: bool) -> None:
    folder = tmp_path / ("a" * 100) if long else temporary / "kit"
    file = folder / "bridge.json"
    for _ in range(3):
        killed_listener(file)
    left = list(temporary.glob("fedcustom-*"))
    assert len(left) == (1 if long else 0), "the next listener removes it"
    listener = BridgeListener(file)
    exchange(listener)
    address = Path(json.loads(file.read_text())["address"])
    assert address.parent.stat().st_mode & 0o777 == 0o700
    listener.close()
    assert not list(temporary.glob("fedcustom-*"))
    assert list(folder.iterdir()) == []


def test_a_live_listeners_folder_is_left_alone(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "MAX_SOCKET_PATH", 0)  # always in the temporary folder
    live = BridgeListener(tmp_path / "one.json")
    (temporary / "fedcustom-results").mkdir()
    (temporary / "fedcustom-results" / "mine.txt").touch()
    (temporary / "fedcustom-fresh").mkdir()
    (temporary / "fedcustom-empty").mkdir()
    os.utime(temporary / "fedcustom-empty", (1.0, 1.0))
    (temporary / "fedcustom-file").touch()
    assert remove_stale_folders() == [temporary / "fedcustom-empty"]
    exchange(live)
    live.close()
    assert {path.name for path in temporary.iterdir()} == {
        "fedcustom-results",
        "fedcustom-fresh",
        "fedcustom-file",
    }


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_request_beyond_the_sites_limit_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setenv(ADDRESS_VARIABLE, str(tmp_path / "bridge.json"))
    if limit is not None:
        monkeypatch.setenv(LIMIT_VARIABLE, str(limit))
    executor = SiteExecutor()
    engine = SimpleNamespace(get_cell=lambda: SimpleNamespace())  # a request for the file would fail
    most = MAX_BYTES if limit is None else limit
    request: Any = {"head": b'{"kind": "train"}', "size": most + 1, "owner": "server", "file": "x"}
    reply = executor.execute(
        "task", request, SimpleNamespace(get_engine=lambda: engine), SimpleNamespace(triggered=False)
    )
    head = json.loads(reply["head"])
    assert head["error"] == f"a message of {most + 1} bytes; at most {most} are allowed"
    assert not list(tmp_path.rglob("*.in"))
