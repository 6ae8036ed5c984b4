"""All checks, one after the other; one that fails itself is reported, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from . import machine, packages
from .finding import Finding

Check = Callable[[], Iterator[Finding]]

CHECKS: Mapping[str, Check] = {
    "python": packages.check_python,
    "packages": packages.check_packages,
    "imports": packages.check_imports,
    "extras": packages.check_extras,
    "smollm2": packages.check_smollm2,
    "dp-accounting with attrs": packages.check_attrs,
    "torchao with torch": packages.check_quantisers,
    "gguf with transformers": packages.check_readers,
    "nvflare": packages.check_nvflare,
    "flash-attn": packages.check_flash_attention,
    "processor": machine.check_processor,
    "cores": machine.check_cores,
    "gpu": machine.check_gpu,
    "memory": machine.check_memory,
    "cache folder": machine.check_cache,
    "temporary folder": machine.check_temporary,
    "file locks": machine.check_locks,
    "compiler": machine.check_compiler,
    "variables": machine.check_variables,
}
"""Checks by name, in the order in which they are made."""


def examine(checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """The findings of all checks. A check that raises an error gives one finding, ``unknown``."""
    found = list[Finding]()
    for name, check in checks.items():
        try:
            found.extend(check())
        except Exception as error:  # of a broken installation, anything
            reason = " ".join(str(error).split())
            said = f"the check itself failed: {type(error).__name__}: {reason}"
            found.append(Finding(name, "unknown", said.rstrip(": ")))
    return found
