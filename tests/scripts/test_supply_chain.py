"""Constraints with hashes, and the software bill of materials."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hash_constraints, sbom = script("hash_constraints"), script("sbom")


def entry(name: str, version: str, digest: str | None) -> dict[str, object]:
    archive = {"archive_info": {"hashes": {"sha256": digest}}} if digest else {"archive_info": {}}
    return {"metadata": {"name": name, "version": version}, "download_info": {"url": "x", **archive}}


def test_hashes_are_written_read_and_merged() -> None:
    report = {"install": [entry("Flask_X", "1.0", "a" * 64), entry("torch", "2.13.0+cpu", "b" * 64)]}
    own = {"metadata": {"name": "fedcustom", "version": "0"}, "download_info": {"url": "x", "dir_info": {}}}
    report["install"].append(own)
    found = hash_constraints.digests(report)
    assert found == {("flask-x", "1.0"): {"a" * 64}, ("torch", "2.13.0+cpu"): {"b" * 64}}
    text = hash_constraints.render(found)
    assert f"torch==2.13.0 \\\n    --hash=sha256:{'b' * 64}\n" in text
    other = {("torch", "2.13.0"): {"c" * 64}, ("gone", "1"): {"d" * 64}}
    both = hash_constraints.merged(hash_constraints.parse(text), {**other, ("flask-x", "1.1"): {"e" * 64}})
    assert both[("torch", "2.13.0")] == {"b" * 64, "c" * 64}
    assert both[("flask-x", "1.1")] == {"e" * 64}, "not the hash of another version"
    assert hash_constraints.parse(hash_constraints.render(both)) == both


def test_a_package_without_a_hash_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x 1: pip reports no SHA-256"):
        hash_constraints.digests({"install": [entry("x", "1", None)]})


def test_the_committed_hashes_are_those_of_the_constraints() -> None:
    text = (ROOT / "constraints-hashes.txt").read_text(encoding="utf-8")
    assert not re.search(r"https?:|--index|--extra|--find|file:", text)
    found = hash_constraints.parse(text)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    constraints = {hash_constraints.normalised(name): version for name, version in pairs}
    assert len(found) > 90
    assert all(digests for digests in found.values())
    for name, version in found:
        assert constraints.get(name, version) == version


def test_the_bill_of_materials_has_the_shape_of_cyclonedx() -> None:
    bill = sbom.bill("fedcustom", ["deploy"], {("numpy", metadata.version("numpy")): ["a" * 64]})
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    components = {component["name"].lower(): component for component in bill["components"]}
    for name in ("torch", "numpy", "nvflare", "cryptography"):
        assert components[name]["version"] == metadata.version(name)
        assert components[name]["purl"] == f"pkg:pypi/{name}@{metadata.version(name)}"
    assert components["numpy"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    references = [component["bom-ref"] for component in bill["components"]]
    assert len(set(references)) == len(references)
    known = {*references, bill["metadata"]["component"]["bom-ref"]}
    assert {dependency["ref"] for dependency in bill["dependencies"]} == known
    assert all(set(dependency["dependsOn"]) <= known for dependency in bill["dependencies"])
    for component in bill["components"]:
        assert set(component) <= {"type", "bom-ref", "name", "version", "purl", "licenses", "hashes"}
        for licence in component.get("licenses", []):
            assert set(licence) in ({"expression"}, {"license"})
    again = sbom.bill("fedcustom", ["deploy"], {("numpy", metadata.version("numpy")): ["a" * 64]})
    assert json.dumps(again) == json.dumps(bill)
