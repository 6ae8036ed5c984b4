"""Check of a site's file by its administrator: what would be read, and what the server would be told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...core.errors import DeploymentError, PolicyError
from ...data.party_data import read_own
from ...data.settings import DataSettings, PublicSettings, TaskKind
from ...methods.contents import CONTENTS, MEANING
from ..replies import MAX_LABELS
from .data import SiteDataSettings, declared_settings, told_labels
from .ledger import COUNTS, Ledger
from .limits import check_platform
from .models import folder_digest, is_local
from .settings import PolicySettings, SiteSettings


def site_report(settings: SiteSettings, file: Path) -> Iterator[str]:
    """What a server would see of this site, line by line.

    Raises:
        DeploymentError: a file of the data is missing, or does not hold what is declared; names the file of
            settings and the line.
        DataError: a file of the data is malformed.
    """
    data, policy = settings.data, settings.policy
    check_platform(policy.max_memory_gigabytes)
    yield f"columns that are read: {', '.join(data.columns or ()) or 'none'}"
    for part in ("train", "development", "test", "public"):
        named = getattr(data, part)
        if named is not None and not (file.parent / named).expanduser().is_file():
            raise DeploymentError(f"{file}: data.{part} = {named!r}: no such file")
    if data.train is None:
        yield "no training rows: data.train is not set, so this site can take part in no training"
    try:
        for task in tasks_of(data):
            yield from _task_report(data, policy, file.parent, task)
    except PolicyError as error:
        raise DeploymentError(f"{file}: {error}") from None
    for content in CONTENTS:
        allowed = "may leave" if getattr(policy, content) else "stay here"
        yield f"{content} {allowed}: {MEANING[content]}"
    for model in policy.base_models or ():
        if is_local(model) and Path(model).expanduser().is_dir():
            yield f"digest of {model}: {folder_digest(Path(model))}"


def ledger_report(kit: Path) -> Iterator[str]:
    """What a site's ledger has counted, in total and in the last 24 hours."""
    ledger = Ledger(kit / "fedcustom" / "ledger.json")
    for count in COUNTS:
        yield f"{count}: {ledger.total(count)} in all, {ledger.last_day(count)} in the last 24 hours"


def tasks_of(data: SiteDataSettings) -> list[TaskKind]:
    """The tasks for which a site declares templates."""
    tasks: list[TaskKind] = []
    if data.text is not None and data.label is not None:
        tasks.append("classification")
    if data.prompt is not None and data.target is not None:
        tasks.append("generation")
    if data.messages is not None:
        tasks.append("chat")
    if data.chosen is not None and data.rejected is not None:
        tasks.append("preference")
    return tasks


def _task_report(
    data: SiteDataSettings, policy: PolicySettings, folder: Path, task: TaskKind
) -> Iterator[str]:
    if task == "classification" and data.labels is None and data.max_labels is None:
        found = _labels(data.model_copy(update={"max_labels": MAX_LABELS}), folder)
        raise PolicyError(f"data.labels is not set; add to [data]: labels = {found} (or max_labels)")
    settings = declared_settings(data, DataSettings(task=task))
    keep = frozenset(data.columns or ())
    own = read_own(data, folder, settings, PublicSettings(text=data.public_text), keep=keep)
    rows = ", ".join(f"{len(getattr(own, part))} {part}" for part in ("train", "development", "test"))
    yield f"rows: {rows}"
    if task == "classification":
        labels = told_labels(data, own)
        yield f"labels that the server is told: {', '.join(map(str, labels))}"
        counts = Counter(str(row[settings.label]) for row in own.train)
        rare = sum(count < policy.least_label_examples for count in counts.values())
        if rare:
            least = policy.least_label_examples
            yield f"labels whose sums are withheld: {rare} (policy.least_label_examples = {least})"


def _labels(data: SiteDataSettings, folder: Path) -> str:
    """The labels of the training rows, as TOML writes them."""
    settings = declared_settings(data, DataSettings())
    own = read_own(data, folder, settings, PublicSettings(), keep=frozenset(data.columns or ()))
    return json.dumps(told_labels(data, own), ensure_ascii=False)
