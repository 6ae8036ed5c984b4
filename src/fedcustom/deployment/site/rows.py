"""Rows of a run at a site: recorded when the run begins here, and compared whenever it is opened again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ...core.errors import PolicyError, RunError
from ...core.files import read_json, write_json
from ...core.text import printable
from ...data.examples import ClientData, Example
from ...federated.fingerprint import row_digest
from .audit import AuditLog

FILE = "data.json"
"""The record, in the site's folder for the run: a digest for each row, and no text. It is never sent."""

OWN = ("train", "development", "test")
PARTS = (*OWN, "public")

CHANGED = "the site's data changed since the run began"
GONE = "the site cannot tell whether its data changed since the run began"
"""All that the server is told."""

Rows = dict[str, list[str]]
"""The digests of a site's rows by part, in the order of the rows."""

DataChanged = Literal["refuse", "accept"]

ACCEPT = "--data-changed=accept"
"""The option of ``fedcustom site start`` by which a run goes on with other rows."""


def rows_of(data: ClientData, public: Sequence[Example], labels: Sequence[str]) -> Rows:
    """The digests of the rows that a site trains on, those that it holds out, and its public texts.

    A digest holds the text of a row's label, and not its number, which depends on the labels of other sites.
    """
    parts = dict(zip(PARTS, (data.train, data.development, data.test, public), strict=True))
    return {
        part: [row_digest(row, labels[row.label] if row.label >= 0 else "") for row in rows]
        for part, rows in parts.items()
    }


class RowRecords:
    """Records of the rows of a site's runs, and what is done where rows have changed: the run is refused or,
    with ``accept``, goes on. Either is in the audit log, which the administrator's console shows.
    """

    def __init__(self, audit: AuditLog, data_changed: DataChanged = "refuse") -> None:
        self.audit, self.accept = audit, data_changed == "accept"
        self._said: set[tuple[str, str]] = set()  # runs and differences: a run asks in every round

    def check_kept(self, folder: Path, *, used: bool) -> None:
        """Refuse a run in which this site has worked (``used``), but whose record is not in its ``folder``
        any more: the site cannot tell what has changed.

        Raises:
            PolicyError: that is not accepted. The error says nothing of the rows.
        """
        if used and _read(folder / FILE) is None:
            text = f"the record of the rows that it began with ({folder / FILE}) is gone or damaged"
            self._decide(folder.name, text, GONE)

    def check(self, folder: Path, rows: Rows, *, opens: bool) -> None:
        """Compare rows with the record in a run's ``folder``, if there is one. ``opens``: the server is about
        to be told the numbers of rows; in the midst of a run they must stay.

        Raises:
            PolicyError: rows differ, and that is not accepted; or it is accepted, but the server has been
                told other numbers. The error says nothing of the rows.
        """
        then = _read(folder / FILE)
        if then is not None and (text := difference(then, rows)):
            self._differs(folder.name, text)
            if not opens and _sizes(then) != _sizes(rows):
                self._say(
                    folder.name,
                    "the rows are accepted, but the server was told how many there were: this site takes "
                    "part again once the server has resumed the run (fedcustom deploy run --resume)",
                )
                raise PolicyError(f"{CHANGED}; it takes part again once the run is resumed")

    def check_unreadable(self, folder: Path, error: Exception) -> None:
        """The same where the rows cannot be read as those of the run any more."""
        if _read(folder / FILE) is not None:
            self._differs(folder.name, str(error))

    def record(self, folder: Path, rows: Rows) -> None:
        """Write the record of a run, where there is another or none."""
        if _read(folder / FILE) != rows:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FILE, rows)

    def _differs(self, run: str, text: str) -> None:
        self._decide(run, f"this site's rows are not those that it began with: {text}", CHANGED)

    def _decide(self, run: str, text: str, told: str) -> None:
        if not self.accept:
            self._say(
                run,
                f"{text}; this site takes no part in the run. Restore the rows, or accept them: "
                f"fedcustom site start ... {ACCEPT}",
            )
            raise PolicyError(told)
        self._say(run, f"{text}; accepted by {ACCEPT}")

    def _say(self, run: str, text: str) -> None:
        if (run, text) not in self._said:
            self._said.add((run, text))
            self.audit.write("data changed", run=run, accepted=self.accept, text=printable(text, lines=False))


def difference(then: Rows, now: Rows) -> str:
    """What differs between two records, in numbers of rows by part; empty where nothing does."""
    found = [
        f"{part}: {text}"
        for part in PARTS
        if (text := _part_difference(then.get(part, []), now.get(part, [])))
    ]
    if not found:
        return ""
    if sum(then.get(part) != now.get(part) for part in OWN) > 1:
        found.append(f"all in all {_in_all(_own(then), _own(now))}")
    held_out = {*then.get("development", []), *then.get("test", [])} - set(then.get("train", []))
    if leaked := sum(row in held_out for row in now.get("train", [])):
        found.append(f"{_rows(leaked)} held out before would be trained on")
    return "; ".join(found)


def _in_all(then: Sequence[str], now: Sequence[str]) -> str:
    """What differs between all rows of a site, whatever their parts."""
    new, gone = (Counter(now) - Counter(then)).total(), (Counter(then) - Counter(now)).total()
    counts = ", ".join(f"{count} {what}" for what, count in (("added", new), ("removed", gone)) if count)
    return f"{counts or 'the same rows, divided otherwise'} ({_rows(len(then))} then, {len(now)} now)"


def _part_difference(then: Sequence[str], now: Sequence[str]) -> str:
    if list(then) == list(now):
        return ""
    removed, added = Counter(then) - Counter(now), Counter(now) - Counter(then)
    if not removed and not added:
        return "the same rows in another order"
    gone, new = removed.total(), added.total()
    # A row at its old place with another content was changed; the others came or went.
    at_place = sum(a in removed and b in added for a, b in zip(then, now, strict=False) if a != b)
    changed = min(at_place, gone, new)
    counts = (("changed", changed), ("added", new - changed), ("removed", gone - changed))
    text = ", ".join(f"{count} {what}" for what, count in counts if count)
    return f"{text} ({_rows(len(then))} then, {len(now)} now)"


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _own(rows: Rows) -> list[str]:
    return [row for part in OWN for row in rows.get(part, [])]


def _sizes(rows: Rows) -> list[int]:
    return [len(rows.get(part, [])) for part in OWN]


def _read(file: Path) -> Rows | None:
    """The record, or None where there is none that can be read."""
    try:
        content = read_json(file)
    except (RunError, OSError):
        return None
    sound = isinstance(content, dict) and content.keys() == set(PARTS) and all(
        isinstance(rows, list) and all(isinstance(row, str) for row in rows) for rows in content.values()
    )  # fmt: skip
    return content if sound else None
