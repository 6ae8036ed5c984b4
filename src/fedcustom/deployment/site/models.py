"""Models on a site's own disk: which of them a recipe may name, and the digest of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

from ...core.errors import PolicyError

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")


def is_local(name: str) -> bool:
    """Whether a model's name stands for something on this machine: it is neither a built-in model nor a hub
    id, or there is a file or folder of that name here.
    """
    if name.startswith("builtin:"):
        return False
    if not HUB_ID.fullmatch(name):
        return True
    return os.path.lexists(name)


def check_model(
    name: str, revision: str | None, allowed: Collection[str] | None, digests: Mapping[str, str]
) -> None:
    """Refuse a model that the site's file does not allow; ``allowed`` is None where the file lists none. With
    a revision, ``name@revision`` must be listed.

    Raises:
        PolicyError: the model is not listed, is a folder of this machine and nothing is listed, or has
            another digest.
    """
    listed = f"{name}@{revision}" if revision else name
    if allowed is None and is_local(name):
        raise PolicyError(
            f"policy.base_models: {name!r} is no hub id or built-in model; a folder of this machine is only "
            f"loaded where it is listed; add to [policy] in site.toml: base_models = [{json.dumps(name)}]"
        )
    if allowed is not None and listed not in allowed:
        raise PolicyError(f"policy.base_models: {listed!r} is not allowed here")
    if (wanted := digests.get(name)) is not None and folder_digest(Path(name)) != wanted:
        raise PolicyError(f"policy.model_digests: the content of {name!r} has another digest than is listed")


def check_digests(allowed: Collection[str], digests: Mapping[str, str]) -> None:
    """Refuse digests of models that are not listed, or that are none.

    Raises:
        PolicyError: names the entry.
    """
    for name, digest in digests.items():
        if name not in allowed:
            raise PolicyError(f"policy.model_digests: {name!r} is not listed in policy.base_models")
        if not is_local(name):
            raise PolicyError(
                f"policy.model_digests: {name!r} is no folder; pin a hub model in base_models as "
                "name@revision"
            )
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise PolicyError(f"policy.model_digests: {name!r}: must be a SHA-256 of 64 hexadecimal digits")


def folder_digest(folder: Path) -> str:
    """SHA-256 of a folder's files: of their names, sizes and contents, in the order of the names.

    A folder is read again only when the size or the time of one of its files has changed.

    Raises:
        PolicyError: it is no folder.
    """
    place = folder.expanduser()
    if not place.is_dir():
        raise PolicyError(f"policy.model_digests: {str(folder)!r} is no folder")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    stamps = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _digest(str(place), stamps)


@lru_cache(maxsize=16)
def _digest(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    hashed = hashlib.sha256()
    for name, size, _ in stamps:
        hashed.update(f"{Path(name).relative_to(folder)}\0{size}\0".encode(errors="surrogateescape"))
        with open(name, "rb") as file:
            while block := file.read(2**20):
                hashed.update(block)
    return hashed.hexdigest()
