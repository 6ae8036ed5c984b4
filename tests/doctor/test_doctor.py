"""Checks of the installation: their findings, remedies, and what happens when a check itself fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from fedcustom.doctor import CHECKS, Finding, examine, machine, packages


def fails() -> Iterator[Finding]:
    raise RuntimeError("no\nsuch thing")
    yield


def test_a_check_that_fails_is_reported_and_the_others_go_on() -> None:
    found = examine({"broken": fails, "python": CHECKS["python"]})
    assert found[0] == Finding("broken", "unknown", "the check itself failed: RuntimeError: no such thing")
    assert (found[1].check, found[1].status) == ("python", "ok")


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lancedb": None, "nvflare": "2.8.0", "cryptography": "50.0"}
    monkeypatch.setattr(packages, "installed", lambda name: versions.get(name, "99.0"))
    found = {one.check: one for one in packages.check_extras()}
    assert found["extra retrieval"].status == "absent"
    assert found["extra retrieval"].remedy == "pip install 'fedcustom[retrieval]'"
    assert found["extra deploy"].status == "failed"
    assert "nvflare 2.8.0" in found["extra deploy"].found
    offered = set(metadata.metadata("fedcustom").get_all("Provides-Extra") or []) - {"dev", "docs"}
    assert set(found) == {f"extra {name}" for name in offered}


@pytest.mark.parametrize(
    ("check", "versions", "status"),
    [
        ("dp-accounting with attrs", {"dp-accounting": "0.6.0", "attrs": "24.1.0"}, "failed"),
        ("dp-accounting with attrs", {"dp-accounting": "0.6.0", "attrs": "23.2.0"}, "ok"),
        ("dp-accounting with attrs", {"attrs": "25.1.0"}, None),
        ("torchao with torch", {"torchao": "0.14.0", "torch": "2.13.0+cpu"}, "failed"),
        ("gguf with transformers", {"gguf": "0.19.0", "transformers": "5.22.0"}, "failed"),
        ("gguf with transformers", {"gguf": "0.19.0", "transformers": "5.23.0"}, "ok"),
        ("nvflare", {"nvflare": "2.7.0"}, "failed"),
        ("nvflare", {"nvflare": "2.9.0"}, "ok"),
    ],
)
def test_combinations(
    check: str, versions: dict[str, str], status: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed", versions.get)
    found = list(CHECKS[check]())
    assert [one.status for one in found] == ([] if status is None else [status])
    assert all(bool(one.remedy) == (one.status == "failed") for one in found)


def test_limits_of_a_container(tmp_path: Path) -> None:
    assert machine.container_memory(tmp_path) is None
    assert machine.processor_quota(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.container_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert machine.container_memory(tmp_path) == 2_000_000_000
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.processor_quota(tmp_path) == 1.5
    older = tmp_path / "older"
    (older / "memory").mkdir(parents=True)
    (older / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.container_memory(older) is None
    (older / "memory" / "memory.limit_in_bytes").write_text("500\n")
    (older / "memory" / "memory.usage_in_bytes").write_text("100\n")
    assert machine.container_memory(older) == 400


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDCUSTOM_CACHE", str(tmp_path / "file" / "cache"))
    (found,) = machine.check_cache()
    assert (found.status, found.remedy) == ("failed", "FEDCUSTOM_CACHE names another folder")


def test_the_command(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("doctor", "--json")
    found = json.loads(said.out)
    assert {"check", "status", "found", "remedy"} == set(found[0])
    assert said.code == (1 if any(one["status"] == "failed" for one in found) else 0)
    monkeypatch.setattr("fedcustom.doctor.examine", lambda: [Finding("a", "failed", "b", "c")])
    said = command("doctor")
    assert said.code == 1
    assert "failed   a  b; c" in said.out
    monkeypatch.setattr("fedcustom.doctor.examine", lambda: [Finding("a", "unknown", "b")])
    assert command("doctor").code == 0
