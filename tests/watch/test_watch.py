"""The page of runs under way, over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fedcustom
from fedcustom.watch.page import parts
from fedcustom.watch.runs import Watched
from fedcustom.watch.server import WatchServer
from helpers.browser import found_by, needs_chromium
from helpers.report import Tags, write_run

RECIPE = 'seed = 3\n[method]\nname = "lora"\n[rounds]\ncount = 20\n[data]\ntask = "classification"\n'


@contextmanager
def served(roots: Sequence[Path]) -> Iterator[WatchServer]:
    with WatchServer(roots) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(
    server: WatchServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def data(server: WatchServer) -> dict[str, str]:
    status, _, text = asked(server, "/data")
    assert status == 200
    found: dict[str, str] = json.loads(text)
    return found


def begun(place: Path, rounds: int = 5, **more: Any) -> Path:
    """A run that this process is at."""
    write_run(place, method="lora", seed=3, rounds=rounds, recipe=RECIPE, **more)
    (place / "summary.json").unlink()
    (place / "run.pid").write_text(str(os.getpid()))
    return place


def test_states_of_runs(tmp_path: Path) -> None:
    begun(tmp_path / "running")
    (begun(tmp_path / "stopped") / "run.pid").write_text("")
    (begun(tmp_path / "killed") / "run.pid").write_text("99999999")
    write_run(tmp_path / "finished", recipe=RECIPE)
    (tmp_path / "starting").mkdir()
    (tmp_path / "starting" / "run.pid").write_text(str(os.getpid()))
    runs, more = Watched([tmp_path]).runs()
    assert [(live.name, live.state, live.last_round, live.rounds) for live in runs] == [
        ("running", "running", 5, 20),
        ("starting", "starting", None, 0),
        ("killed", "stopped", 5, 20),
        ("stopped", "stopped", 5, 20),
        ("finished", "finished", 20, 20),
    ]
    assert more == 0
    (later,), _ = Watched([tmp_path / "later"]).runs()
    assert (later.name, later.state) == ("later", "not started")


def test_metrics_that_rounds_have_come_before_those_of_the_final_test(tmp_path: Path) -> None:
    """Texts are written for the test alone: a run is watched by its loss."""
    scores = {"rouge_l": 40.0, "loss": 1.5}
    place = write_run(tmp_path / "run", recipe=RECIPE, task="generation", metrics=scores)
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "development": {"loss": 2.0}}) + "\n" for row in rows)
    (place / "metrics.jsonl").write_text(text)
    chooser = parts(*Watched([tmp_path]).runs())["chooser"]
    assert chooser.index("Loss") < chooser.index("ROUGE-L")


def test_a_file_that_grows_is_read_on(tmp_path: Path) -> None:
    place = begun(tmp_path / "run", rounds=2)
    watched = Watched([place])

    def rounds() -> list[int]:
        (live,), _ = watched.runs()
        assert not live.unreadable
        return [row.round for row in live.run.history]

    assert rounds() == [0, 1, 2]
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "development": {"acc')
    assert rounds() == [0, 1, 2]
    with (place / "metrics.jsonl").open("a") as file:
        file.write('uracy": 0.5}}\n')
    assert rounds() == [0, 1, 2, 3]
    kept = (place / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
    (place / "new").write_text("".join(kept))  # the run goes on from an earlier checkpoint
    (place / "new").replace(place / "metrics.jsonl")
    assert rounds() == [0, 1]
    with (place / "metrics.jsonl").open("a") as file:
        file.write("no round\n")
    (live,), _ = watched.runs()
    assert live.unreadable == ["metrics.jsonl, line 3: Invalid JSON: expected ident at line 1 column 2"]
    assert [row.round for row in live.run.history] == [0, 1]


def test_only_its_own_page_is_served_and_only_to_this_machine(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    (tmp_path / "secret.txt").write_text("secret")
    with served([tmp_path]) as server:
        port = server.server_port
        assert server.server_address[0] == "127.0.0.1"
        for path in ("/", "/data"):
            assert asked(server, path)[0] == 200
            assert asked(server, path, host=f"localhost:{port}")[0] == 200
            for host in (
                "evil.example",
                f"evil.example:{port}",
                "127.0.0.1",
                f"127.0.0.1:{port}.evil.example",
                "",
            ):
                status, _, text = asked(server, path, host=host)
                assert (status, "lora" in text) == (403, False), host
        for path in (
            "/secret.txt",
            "/../secret.txt",
            "/run/metrics.jsonl",
            "/%2e%2e/secret.txt",
            "/data?x",
        ):
            status, _, text = asked(server, path)
            assert (status, "secret" in text) == (404, False)
        for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
            status, headers, _ = asked(server, "/data", method)
            assert (status, headers["Allow"]) == (405, "GET")
        status, headers, page = asked(server, "/")
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-inline" not in policy.split("style-src")[0]
        assert "Access-Control-Allow-Origin" not in headers
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
        status, _, text = asked(server, "/report")
        assert (status, text) == (409, "No report: no folder was named: no finished run (no summary.json)\n")


def test_connections_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcustom.watch.server.MOST_CONNECTIONS", 2)
    with served([tmp_path]) as server:
        address = ("127.0.0.1", server.server_port)
        idle = [socket.create_connection(address) for _ in range(2)]
        with socket.create_connection(address, timeout=20) as third:
            assert third.recv(1) == b""  # closed
        for connection in idle:
            connection.close()
        for _ in range(100):  # their threads end soon after
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                assert asked(server, "/data")[0] == 200
                return
        raise AssertionError("no connection was free again")


PAYLOAD = "<img src=x onerror='window.injected = 1'>"


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    place = begun(tmp_path / PAYLOAD.replace("/", ""), clients=[PAYLOAD, "b"], left_out={PAYLOAD: PAYLOAD})
    (place / "warnings.log").write_text(PAYLOAD)
    with served([place]) as server:
        (tmp_path / "page.html").write_text(asked(server, "/")[2])
    page = Tags(tmp_path / "page.html")
    assert not any(tag == "img" for tag, _ in page.tags)
    assert page.text.count("window.injected = 1") > 4


def test_a_run_is_seen_round_by_round(small: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[str] = []

    class Look(fedcustom.Callback):
        def on_round_end(self, row: Any) -> None:
            seen.append(data(server)["runs"])

    with served([run]) as server:
        assert "not started" in data(server)["runs"]
        fedcustom.run(small, {"rounds.count": 3}, out=run, callbacks=[Look()])
        after = data(server)
        status, _, report = asked(server, "/report")
    assert [re.findall(r"(\d+ of 3)<progress", html) for html in seen] == [
        [f"{number} of 3"] for number in range(len(seen))
    ]
    assert all('class="state running"' in html for html in seen)
    assert 'class="state finished"' in after["runs"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f">{last['development']['accuracy']:.3f}<" in after["runs"]
    assert 'data-plot="rounds-classification"' in after["plots"]
    assert (status, "<h1>Customising" in report) == (200, True)


def test_sites_and_warnings(tmp_path: Path) -> None:
    place = begun(tmp_path / "run", clients=["a", "b"], left_out={"b": "not connected"}, rounds=4)
    (place / "run_id").write_text("x")
    (place / "warnings.log").write_text("round 2: client b left out")
    with served([place]) as server:
        details = data(server)["details"]
    assert "Sites of run" in details
    assert '<span class="state answered">answered in round 4</span>' in details
    assert '<span class="state absent">absent since round 2: not connected</span>' in details
    assert "round 2: client b left out" in details


def test_runs_of_several_tasks_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", task="generation")
    with served([tmp_path]) as server:
        plots = data(server)["plots"]
        assert {"Quality by round (classification)", "Quality by round (generation)"} <= set(
            re.findall("<h2[^>]*>([^<]*)</h2>", plots)
        )
        assert asked(server, "/report")[0] == 409
    monkeypatch.setattr("fedcustom.watch.runs.MOST_RUNS", 1)
    runs, more = Watched([tmp_path]).runs()
    assert (len(runs), more) == (1, 1)


def test_ctrl_c_ends_it_with_a_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcustom", "watch", str(tmp_path), "--no-open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert re.fullmatch(
        rf"watching {re.escape(str(tmp_path))}: http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line
    )
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "stopped watching; the runs go on\n")


def test_bad_arguments(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command("watch", tmp_path / "file", "--no-open")
    assert result.code == 2
    assert "is a file; name a run's directory, or a folder of runs" in result.error
    with served([tmp_path]) as server:
        taken = command("watch", tmp_path, "--no-open", "--port", server.server_port)
    assert taken.code == 2
    assert f"--port {server.server_port}: Address already in use; 0 takes a free one" in taken.error


PROBE = """<!doctype html><body><iframe id="page" src="/" width="WIDTH" height="900"></iframe><script>
const page = document.getElementById("page").contentWindow;
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
onload = async () => {
  await wait(1);
  const all = (selector) => [...page.document.querySelectorAll(selector)];
  page.document.querySelector("input[value=loss]").click();
  all("details").find((each) => each.dataset.key === "two").open = true;
  const root = page.document.documentElement;
  await fetch("/grow");
  await wait(6);
  const found = {overflow: root.scrollWidth - root.clientWidth,
    chosen: page.document.querySelector("input[name=metric]:checked").value,
    shown: all(".plot:not([hidden])").map((each) => each.dataset.metric ?? "").filter(Boolean),
    open: all("details[open]").map((each) => each.dataset.key),
    buttons: all("button.csv").length - all("table").length,
    progress: all("progress").map((each) => each.value),
    injected: page.injected ?? null};
  document.body.setAttribute("data-found", JSON.stringify(found));
};
</script></body>"""


def test_a_browser_that_leaves_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with WatchServer([tmp_path]) as server:
        monkeypatch.setattr(server, "parts", lambda: {"plots": "x" * 2**24})  # more than a socket buffers
        here, there = socket.socketpair()
        there.sendall(f"GET /data HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        there.close()
        server.process_request_thread(here, ("127.0.0.1", 1))
        assert capsys.readouterr().err == ""

        def fails() -> dict[str, str]:
            raise ValueError("a bug")

        monkeypatch.setattr(server, "parts", fails)
        here, there = socket.socketpair()
        there.sendall(f"GET /data HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode())
        server.process_request_thread(here, ("127.0.0.1", 1))
        there.close()
        assert "ValueError: a bug" in capsys.readouterr().err


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_renews_itself_and_keeps_what_a_reader_chose(tmp_path: Path, width: int) -> None:
    runs = tmp_path / "runs"
    begun(runs / "one", rounds=5)
    begun(runs / "two", rounds=5, clients=["a", PAYLOAD], left_out={"a": "lost"})

    class Relay(BaseHTTPRequestHandler):
        """The probe with the page in a frame, which its own policy forbids; and a round more when asked."""

        def do_GET(self) -> None:
            status, headers, text = 200, dict[str, str](), ""
            if self.path == "/probe":
                headers, text = {"Content-Type": "text/html"}, PROBE.replace("WIDTH", str(width))
            elif self.path == "/grow":
                with (runs / "one" / "metrics.jsonl").open("a") as file:
                    file.write(
                        '{"round": 6, "development": {"accuracy": 0.5, "loss": 0.7}, "cohort": ["a"]}\n'
                    )
            else:
                status, headers, text = asked(server, self.path)
            policy = headers.get("Content-Security-Policy", "").replace("; frame-ancestors 'none'", "")
            self.send_response(status)
            self.send_header("Content-Type", headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Security-Policy", policy)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with served([runs]) as server, ThreadingHTTPServer(("127.0.0.1", 0), Relay) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        found = found_by("", tmp_path, url=f"http://127.0.0.1:{relay.server_port}/probe")
        relay.shutdown()
    assert found == {
        "overflow": 0, "chosen": "loss", "shown": ["loss", "loss"], "open": ["two"], "buttons": 0,
        "progress": [0.3, 0.25], "injected": None,
    }  # fmt: skip
