"""The command ``serve`` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import fedcustom


@pytest.fixture(scope="module")
def directory(tiny: dict[str, str], data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "model": {"base": tiny["llama"]},
        "data": {
            "source": str(data_folder), "task": "generation", "test": "test", "prompt": "{source} :",
            "target": " {target}", "max_length": 24, "max_target_length": 16,
        },
        "clients": {"partition": "iid", "count": 2},
        "method": {"name": "lora", "rank": 2},
        "training": {"batch_size": 8, "local_steps": 1},
        "rounds": {"count": 1},
        "evaluation": {"generate": False, "untuned": False},
    }  # fmt: skip
    place = tmp_path_factory.mktemp("served") / "run"
    fedcustom.run(recipe, out=place)
    return place


def started(directory: Path, *options: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The server's process, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcustom", "serve", str(directory), "--port", "0", *options],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r" at (http://\S+);", line):
            return process, found[1]
    raise AssertionError(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_signal_ends_it_while_the_model_writes(directory: Path, number: signal.Signals) -> None:
    process, url = started(directory, "--name", "mine", FEDCUSTOM_API_KEY="secret")
    try:
        headers = {"authorization": "Bearer secret"}
        (model,) = httpx.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert model["id"] == "mine"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        body = {"model": "mine", "prompt": "a cat", "temperature": 2, "max_tokens": 40, "stream": True}
        got, begun = list[str](), threading.Event()

        def ask() -> None:
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as said,
            ):
                for line in said.iter_lines():
                    got.append(line)
                    begun.set()

        thread = threading.Thread(target=ask)
        thread.start()
        begun.wait(20)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        thread.join(10)
    finally:
        process.kill()
    assert process.returncode == 0
    assert got
    assert error.strip() == "stopped"
    assert "Traceback" not in error


def test_connections_are_limited(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import fedcustom.serving.server as server\nserver.MOST_CONNECTIONS = 3\n"
    )
    process, url = started(directory, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    try:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        assert httpx.get(f"{url}/health").status_code == 200
        with contextlib.ExitStack() as idle:
            for _ in range(3):
                idle.enter_context(socket.create_connection(address))
            assert httpx.get(f"{url}/health").status_code == 503
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_refusals(directory: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("serve", tmp_path, "--port", 0)
    assert (said.code, said.error.strip()) == (2, f"error: {tmp_path}: holds no run (no recipe.toml)")
    with socket.create_server(("127.0.0.1", 0)) as taken, monkeypatch.context() as patch:
        patch.setattr("fedcustom.serving.server.Served", None)  # no model is loaded for a taken address
        said = command("serve", directory, "--port", taken.getsockname()[1])
    assert said.code == 2
    assert "Address already in use" in said.error
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = command("serve", directory)
    assert said.code == 2
    assert "serve: needs FastAPI and uvicorn: pip install" in said.error


def test_other_machines_are_warned_of(directory: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcustom.serving.server.StoppingServer.run", lambda *_, **__: None)
    said = command("serve", directory, "--host", "0.0.0.0", "--port", "0")
    assert said.code == 0
    text = " ".join(said.error.split())
    assert "there is no TLS" in text
    assert "no API key is asked for" in text
    quiet = command("serve", directory, "--port", "0", "--api-key", "x")
    assert "warning" not in quiet.error
