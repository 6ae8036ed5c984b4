"""Dockerfiles, compose file and Kubernetes manifests, parsed and held to rules: nothing here builds them."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fedcustom.cli.app import app

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "containers"
FILES = sorted(PLACE.glob("Dockerfile.*"))
MANIFESTS = sorted((PLACE / "kubernetes").glob("*.yaml"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
USER = 10001


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", file.read_text(encoding="utf-8"))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def documents() -> list[dict[str, Any]]:
    return [each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def pods() -> list[dict[str, Any]]:
    return [each["spec"]["template"]["spec"] for each in documents() if "template" in each["spec"]]


def check_command(words: list[str]) -> None:
    """The command line knows a command and its options."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_dockerfiles(file: Path) -> None:
    found = instructions(file)
    names = [name for name, _ in found]
    assert "ADD" not in names, "COPY says what it does"
    stages = {rest.partition(" AS ")[2] for name, rest in found if name == "FROM"} - {""}
    for name, rest in found:
        if name == "FROM":
            image, _, tag = rest.partition(" ")[0].partition(":")
            assert image in stages or re.fullmatch(r"\d+\.\d+\.\d+-[\w-]+", tag), (
                "a whole version, not latest"
            )
        if name == "RUN":
            assert not re.search(r"curl|wget|sudo|https?://|chmod 777", rest)
            if "pip install" in rest:
                assert "--no-deps" in rest
                assert "--require-hashes" in rest or rest.endswith("--no-build-isolation .")
        if name == "COPY" and not rest.startswith("--from"):
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), source
    assert [rest for name, rest in found if name == "USER"] == [f"{USER}:{USER}"]
    last = len(names) - 1 - names[::-1].index("FROM")
    assert names.index("USER") > last
    assert "RUN" not in names[names.index("USER") :]
    (default,) = (yaml.safe_load(rest) for name, rest in found if name == "CMD")
    if default != ["--help"]:
        check_command(default)


def test_only_what_is_copied_reaches_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for file in FILES:
        for name, rest in instructions(file):
            if name == "COPY" and not rest.startswith("--from"):
                assert set(shlex.split(rest)[:-1]) <= allowed


def test_compose() -> None:
    found = yaml.safe_load((PLACE / "compose.yaml").read_text(encoding="utf-8"))
    assert set(found["services"]) == {"server", "site", "serve"}
    for name, service in found["services"].items():
        assert service["read_only"] is True
        assert service["user"] == f"{USER}:{USER}"
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service
        assert service["image"].endswith(f":{VERSION}")
        assert not any("docker.sock" in volume for volume in service["volumes"])
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        words = service["command"]
        if name == "serve":  # through a shell, which reads the key
            (line,) = words
            words = shlex.split(line.partition("exec fedcustom ")[2])
        check_command(words)
    assert "ports" not in found["services"]["site"], "a site opens none"
    assert found["services"]["serve"]["ports"][0].startswith("127.0.0.1:")


def test_manifests() -> None:
    kinds = {each["kind"] for each in documents()}
    assert kinds == {"Deployment", "Job", "NetworkPolicy", "PersistentVolumeClaim", "Service"}
    claims = {each["metadata"]["name"] for each in documents() if each["kind"] == "PersistentVolumeClaim"}
    templates = [each["spec"]["template"] for each in documents() if "template" in each["spec"]]
    labels = [template["metadata"]["labels"] for template in templates]
    for each in documents():
        assert {"apiVersion", "kind", "metadata", "spec"} == set(each)
        if each["kind"] == "Service":
            assert each["spec"]["selector"] in labels
        if each["kind"] == "Deployment":
            assert each["spec"]["selector"]["matchLabels"] == each["spec"]["template"]["metadata"]["labels"]
            assert each["spec"]["strategy"] == {"type": "Recreate"}, "two would write into one folder"
    assert len(pods()) == 3
    for pod in pods():
        whole = pod["securityContext"]
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] == USER
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for volume in pod["volumes"]:
            assert "hostPath" not in volume
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        (container,) = pod["containers"]
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container["image"].endswith(f":{VERSION}")
        assert "limits" in container["resources"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        check_command(container["args"])


def test_a_site_is_not_reachable() -> None:
    (policy,) = (each["spec"] for each in documents() if each["kind"] == "NetworkPolicy")
    assert policy["ingress"] == []
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {8002, 53}
