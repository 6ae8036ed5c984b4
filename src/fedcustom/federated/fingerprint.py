"""The fingerprint of a run's data, by which a run that goes on notices that its rows are others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import read_json, write_json
from ..data.build import build_data, with_builtin_columns
from ..data.examples import Example, FederatedData
from ..data.many_clients import ManyClients
from ..data.sources import local_file
from ..recipe import Recipe

FILE = "data.json"
"""The file of the fingerprint in a run's directory: counts and digests, no text."""

TOGETHER = " clients together"
"""How the entry of all clients ends, where they have one."""

Fingerprint = dict[str, Any]


def of_data(recipe: Recipe, data: FederatedData) -> Fingerprint:
    """Digests of the local files that were read, the labels, and how many examples each client's training,
    development and test part has, with the digest of all of them.

    A digest is BLAKE2b of 16 bytes. Of a text that can be guessed it tells whether the guess is right.
    Where clients are too many for an object each (:mod:`fedcustom.data.many_clients`), all have one entry.
    """
    if isinstance(data.clients, ManyClients):
        everyone = data.clients.digest() + _digest(data.clients.examples)
        entry = {f"{len(data.clients)}{TOGETHER}": [len(data.clients.examples), 0, 0, everyone]}
        return {
            "files": files_of(recipe),
            "labels": list(data.task.labels),
            "clients": entry,
            "shared": _shared(data),
        }
    clients = {
        name: [
            *(len(client.train), len(client.development), len(client.test)),
            _digest([*client.train, *client.development, *client.test]),
        ]
        for name, client in data.clients.items()
    }
    labels = list(data.task.labels)
    return {"files": files_of(recipe), "labels": labels, "clients": clients, "shared": _shared(data)}


def of_server(data: FederatedData) -> Fingerprint | None:
    """The same of a deployed run's server, which has development, test and public examples at most; None
    where it has none. Each site compares its own rows.
    """
    shared = _shared(data)
    return {"files": {}, "labels": [], "clients": {}, "shared": shared} if shared else None


def _shared(data: FederatedData) -> dict[str, list[Any]]:
    return {
        part: [len(examples), _digest(examples)]
        for part in ("development", "test", "public")
        if (examples := getattr(data, part))
    }


def check(directory: Path, found: Fingerprint, *, accept: bool) -> str | None:
    """Compare data with the fingerprint in a run's directory, if there is one.

    Returns what is to be said: what differs, where that is accepted.

    Raises:
        RunError: rows differ, and that is not accepted.
    """
    file = directory / FILE
    difference = _difference(read_json(file), found) if file.exists() else None
    if difference is None:
        return None
    if not accept:
        raise RunError(_refusal(directory, difference))
    return f"goes on with other data than it began with: {difference}"


def record(directory: Path, found: Fingerprint) -> None:
    """Write a fingerprint into a run's directory."""
    write_json(directory / FILE, found)


def check_finished(directory: Path, recipe: Recipe, *, accept: bool) -> str | None:
    """Compare a finished run's data with what its files hold now; they are read again only where a file has
    another content. Returns what is to be said.

    Raises:
        RunError: rows differ, and that is not accepted.
    """
    file = directory / FILE
    if not file.exists():
        return None  # made before fingerprints, or by a server without data of its own
    recorded, files = read_json(file), files_of(recipe)
    if not recorded["clients"]:
        return None  # across sites, which have the rows
    if files == recorded["files"]:
        return None
    if gone := sorted(recorded["files"].keys() - files.keys()):
        return f"{gone[0]}: is no longer there, so it was not checked whether the data are the same"
    settings, clients = with_builtin_columns(recipe.data, recipe.clients)
    data = build_data(settings, clients, recipe.seed, recipe.public)
    difference = _difference(recorded, of_data(recipe, data))
    if difference is None:
        return None
    if not accept:
        raise RunError(_refusal(directory, difference))
    return f"was made with other data: {difference}"


def _refusal(directory: Path, difference: str) -> str:
    return (
        f"{directory}: the data are not those of this run: {difference}; name another --out, or accept them "
        "with --data-changed=accept"
    )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference of two fingerprints in words; None where only files differ, but no row."""
    if old["labels"] != new["labels"]:
        changed = sorted(set(old["labels"]) ^ set(new["labels"]))
        return f"the labels differ ({', '.join(map(repr, changed[:5]))})"
    before, now = old["clients"], new["clients"]
    if old["files"] and old["files"] == new["files"] and _together(before) != _together(now):
        before = now  # one was made with an entry for each client, but of the same files
    if list(before) != list(now):
        changed = sorted(before.keys() ^ now.keys())
        return f"{len(before)} clients there, {len(now)} here" + (f" ({changed[0]!r})" if changed else "")
    others = [name for name in before if before[name] != now[name]]
    if others:
        name = others[0]
        rows = f"{sum(before[name][:3])} there, {sum(now[name][:3])} here"
        return f"the rows of {len(others)} of {len(before)} clients differ (first {name!r}: {rows})"
    for part in dict.fromkeys([*old["shared"], *new["shared"]]):
        there, here = old["shared"].get(part, [0, ""]), new["shared"].get(part, [0, ""])
        if there != here:
            return f"the {part} rows differ ({there[0]} there, {here[0]} here)"
    return None


def _together(clients: Mapping[str, Any]) -> bool:
    return len(clients) == 1 and next(iter(clients)).endswith(TOGETHER)


def files_of(recipe: Recipe) -> dict[str, str]:
    """The digest of each local file of data that a recipe names, by its path."""
    splits = [recipe.data.train, recipe.data.development, recipe.data.test]
    named = [(recipe.data, split) for split in splits if split is not None]
    if recipe.public.source is not None:
        named.append((recipe.data.model_copy(update={"source": recipe.public.source}), recipe.public.split))
    paths = [path for settings, split in named if (path := local_file(settings, split)) is not None]
    return {str(path): _file_digest(path) for path in paths}


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def row_digest(example: Example, label: str) -> str:
    """The digest of one example with the text of its label: BLAKE2b of 8 bytes, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    _add(digest, _parts(example, label))
    return digest.hexdigest()


def _digest(examples: Sequence[Example]) -> str:
    """The digest of examples in their order; lengths stand before texts, so that none runs into the next."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        _add(digest, _parts(example, str(example.label)))
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, parts: Iterable[str]) -> None:
    for part in parts:
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)


def _parts(example: Example, label: str) -> Iterable[str]:
    yield from (example.text, label, example.target, str(len(example.references)))
    yield from example.references
    for message in example.messages:
        yield from (message.role, message.content)
    yield from example.options
    if example.rejected:
        yield example.rejected
