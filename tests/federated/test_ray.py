"""Workers in Ray's processes: the same tensors as in one process, one that is killed, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.recipe.recipe import load_recipe, to_toml
from fedcustom.transport.workers.pool import WorkerPool
from helpers.runs import rows_of, without_seconds
from helpers.workers import are_equal, gap, with_ray, with_workers

pytestmark = [with_ray, pytest.mark.slow, pytest.mark.timeout(900)]


class KillsOne(fedcustom.Callback):
    """Kills the process of the first worker after the first round, as the system does that has no memory."""

    def __init__(self) -> None:
        self.pools: list[WorkerPool] = []
        self.folders: list[Path] = []
        self.notes: list[str] = []

    def on_round_end(self, row: dict[str, Any]) -> None:
        """Kill it."""
        if row["round"] != 1:
            return
        (pool,) = self.pools
        cluster = pool._cluster
        assert cluster is not None
        assert cluster._folder is not None
        self.folders.append(cluster._folder)
        os.kill(cluster.ray.get(pool._workers[0].actor.ready.remote()), signal.SIGKILL)

    def on_note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_a_worker_that_is_killed_changes_nothing(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    recipe = {**small, "method": {"name": "lora"}, "training": {"batch_size": 8, "cohort_width": 1}}
    one = fedcustom.run(recipe, out=tmp_path / "alone")
    told, begun = KillsOne(), WorkerPool.__init__

    def begin(self: WorkerPool, *arguments: Any) -> None:
        begun(self, *arguments)
        told.pools.append(self)

    monkeypatch.setattr(WorkerPool, "__init__", begin)
    many = fedcustom.run(with_workers(recipe), out=tmp_path / "workers", callbacks=[told])
    assert are_equal(one.directory, many.directory)
    rows = [[without_seconds(row) for row in rows_of(run.directory)] for run in (one, many)]
    assert rows[0] == rows[1]
    assert [text for text in told.notes if text.startswith("worker 1 of 2 died")]
    assert not ray.is_initialized()
    assert not told.folders[0].exists()
    assert not processes_of(told.folders[0])


def test_ctrl_c_leaves_a_run_that_goes_on_and_no_process(small: dict[str, Any], tmp_path: Path) -> None:
    recipe = with_workers({**small, "method": {"name": "lora"}, "rounds": {"count": 40}})
    recipe["evaluation"] = {**recipe["evaluation"], "every": 40}
    file, temporary = tmp_path / "recipe.toml", tmp_path / "t"
    file.write_text(to_toml(load_recipe(recipe)))
    temporary.mkdir()
    command = [sys.executable, "-m", "fedcustom", "run", str(file), "--out", str(tmp_path / "run"), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    family = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait(120) == 130
    assert family
    left = [pid for pid in family if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]
    assert not left
    done = len(rows_of(tmp_path / "run"))
    assert 2 < done < 41
    single = {key: value for key, value in recipe.items() if key != "workers"}
    one = fedcustom.run(single, out=tmp_path / "alone")
    fedcustom.run(single, out=tmp_path / "run", resume=True)
    assert gap(one.directory, tmp_path / "run") < 1e-4  # forty rounds of other batches


def test_a_cluster_by_its_address(small: dict[str, Any], tmp_path: Path) -> None:
    """A cluster that runs already is used, and goes on running."""
    recipe = {**small, "method": {"name": "lora"}, "training": {"batch_size": 8, "cohort_width": 1}}
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        ray = Path(sys.executable).parent / "ray"
        options = ["--port", address.rpartition(":")[2], "--num-cpus", "2", "--temp-dir", folder]
        quiet = ["--include-dashboard", "false", "--disable-usage-stats", "--node-ip-address", "127.0.0.1"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        head = subprocess.Popen([ray, "start", "--head", "--block", *options, *quiet], env=environment)
        try:
            file = tmp_path / "recipe.toml"
            file.write_text(to_toml(load_recipe(with_workers(recipe, address=address))))
            command = [sys.executable, "-m", "fedcustom", "run", str(file), "--out", str(tmp_path / "run")]
            for _ in range(5):  # until the head is there
                time.sleep(5)
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
                if "no Ray at" not in done.stderr:
                    break
            assert done.returncode == 0, done.stderr
            assert head.poll() is None
        finally:
            head.terminate()
            head.wait(60)
    one = fedcustom.run(recipe, out=tmp_path / "alone")
    assert are_equal(one.directory, tmp_path / "run")


def children(pid: int) -> list[int]:
    """The processes that descend from one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def state(pid: int) -> str:
    """The state of a process, as the kernel has it; Z is one that is dead."""
    try:
        return (Path(f"/proc/{pid}") / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def processes_of(folder: Path) -> list[str]:
    """The processes whose command line names a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            content = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in content:
            found.append(content)
    return found
