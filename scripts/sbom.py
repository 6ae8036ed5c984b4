"""Write a software bill of materials (CycloneDX 1.6, JSON) of this package and what it was installed with.

    python scripts/sbom.py --out build/sbom.json            # or: make sbom

The components are the installed distributions that fedcustom and its extras depend on, directly or not, with
version, licence and package URL as their metadata say; hashes come from constraints-hashes.txt where the
version is the same. The document names no machine and no index, and is the same for the same environment.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NAME = "fedcustom"
DIGESTS = re.compile(
    r"^([A-Za-z0-9._-]+)==([^\s\\]+)((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})+)", re.MULTILINE
)


def normalised(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def reference(name: str, version: str) -> str:
    """Package URL, which is also the component's reference."""
    return f"pkg:pypi/{normalised(name)}@{version}"


def dependencies(distribution: metadata.Distribution, extras: Iterable[str]) -> list[Requirement]:
    """What a distribution requires here, with these extras."""
    wanted = ["", *extras]
    requirements = [Requirement(text) for text in distribution.requires or []]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in wanted)
    ]


def collect(name: str, extras: Iterable[str]) -> tuple[dict[str, metadata.Distribution], dict[str, set[str]]]:
    """The installed distributions that one depends on, by name, and each one's direct dependencies."""
    found: dict[str, metadata.Distribution] = {}
    edges: dict[str, set[str]] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    queue = deque([(name, tuple(sorted(extras)))])
    while queue:
        current, asked = queue.popleft()
        key = normalised(current)
        if (key, asked) in seen:
            continue
        seen.add((key, asked))
        try:
            distribution = metadata.distribution(current)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        found[key] = distribution
        for requirement in dependencies(distribution, asked):
            edges.setdefault(key, set()).add(normalised(requirement.name))
            queue.append((requirement.name, tuple(sorted(requirement.extras))))
    return found, {key: {name for name in names if name in found} - {key} for key, names in edges.items()}


def licences(distribution: metadata.Distribution) -> list[dict[str, Any]]:
    """A distribution's licence: an SPDX expression, or the words of its metadata."""
    about = distribution.metadata
    if expression := about.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = [
        text.rsplit(" :: ", 1)[-1]
        for text in about.get_all("Classifier") or []
        if text.startswith("License ::")
    ]
    words = classifiers or [(about.get("License") or "").strip().split("\n")[0][:200]]
    return [{"license": {"name": text}} for text in words if text]


def bill(name: str, extras: Iterable[str], digests: Mapping[tuple[str, str], list[str]]) -> dict[str, Any]:
    """The CycloneDX document.

    Raises:
        PackageNotFoundError: the package itself is not installed.
    """
    root = metadata.distribution(name)
    found, edges = collect(name, extras)
    components = []
    for key, distribution in sorted(found.items()):
        if key == normalised(name):
            continue
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": reference(key, distribution.version),
            "name": distribution.metadata["Name"],
            "version": distribution.version,
            "purl": reference(key, distribution.version),
        }
        if stated := licences(distribution):
            component["licenses"] = stated
        if known := digests.get((key, distribution.version.partition("+")[0])):
            component["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in known[:1]]
        components.append(component)
    references = {key: reference(key, distribution.version) for key, distribution in found.items()}
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": reference(name, root.version),
                "name": name,
                "version": root.version,
                "purl": reference(name, root.version),
                "licenses": licences(root),
            }
        },
        "components": components,
        "dependencies": [
            {"ref": references[key], "dependsOn": sorted(references[n] for n in edges.get(key, set()))}
            for key in sorted(found)
        ],
    }
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"
    return document


def read_digests(file: Path) -> dict[tuple[str, str], list[str]]:
    """Digests by name and version from constraints-hashes.txt; one that has several builds is left out."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    found = {}
    for match in DIGESTS.finditer(text):
        values = re.findall(r"sha256:([0-9a-f]{64})", match[3])
        if len(values) == 1:
            found[normalised(match[1]), match[2]] = values
    return found


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom.json")
    parser.add_argument("--extras", default="deploy,retrieval")
    arguments = parser.parse_args()
    extras = [extra for extra in arguments.extras.split(",") if extra]
    document = bill(NAME, extras, read_digests(ROOT / "constraints-hashes.txt"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.out}: {len(document['components'])} components")


if __name__ == "__main__":
    main()
