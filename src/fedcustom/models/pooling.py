"""Pooling settings of an encoder, from its folder and the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import ModelError
from .settings import ModelSettings

PoolingName = Literal["mean", "first", "max", "last", "pooler"]

NAMES: dict[str, PoolingName] = {"mean": "mean", "cls": "first", "max": "max", "lasttoken": "last"}
"""What ``sentence-transformers`` calls ours."""

LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The keys of configurations before ``pooling_mode``."""


@dataclass(frozen=True)
class Pooling:
    """How states become one vector, and whether it is divided by its length."""

    name: PoolingName
    normalize: bool


def find_pooling(settings: ModelSettings, path: str) -> Pooling | None:
    """The pooling of an encoder that is classified; None: the classification head of its own architecture.

    ``path`` is the folder or hub id. ``model.pooling = "auto"`` is what a ``sentence-transformers`` folder or
    a customised :class:`~.pooled_classifier.PooledClassifier` says; ``model.normalize`` unset likewise.

    Raises:
        ModelError: the folder pools in a way that is not known here.
    """
    found = _of_folder(settings, path)
    if settings.pooling == "auto":
        if found is None:
            if settings.normalize:
                raise ModelError(
                    f"model.normalize = true: {settings.base} does not say how it is pooled; "
                    "set model.pooling"
                )
            return None
        name = found.name
    else:
        name = settings.pooling
    normalize = settings.normalize
    if normalize is None:
        normalize = found is not None and found.normalize
    return Pooling(name, normalize)


def _of_folder(settings: ModelSettings, path: str) -> Pooling | None:
    """What a ``sentence-transformers`` package, or a classifier that this package saved, says."""
    own = _read(settings, path, "config.json") or {}
    if own.get("model_type") == "pooled-classifier":
        return Pooling(own["pooling"], bool(own["normalize"]))
    modules = _read(settings, path, "modules.json")
    if not isinstance(modules, list):
        return None
    kinds = {str(each.get("type", "")).rpartition(".")[2]: str(each.get("path", "")) for each in modules}
    if "Pooling" not in kinds:
        return None
    if "Dense" in kinds and settings.pooling == "auto":
        raise ModelError(
            f"model.pooling = 'auto': {settings.base} has a Dense layer behind its pooling, which our "
            f"classifiers do not have; allowed: one of {', '.join(NAMES)}, for the encoder without it"
        )
    said = _read(settings, path, f"{kinds['Pooling']}/config.json") or {}
    mode: Any = said.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in LEGACY.items() if said.get(key)]
        others = (key for key in said if key.startswith("pooling_mode_") and key not in LEGACY)
        mode += [key for key in others if said[key]]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in NAMES:
        if settings.pooling != "auto":
            return Pooling("mean", "Normalize" in kinds)
        raise ModelError(
            f"model.pooling = 'auto': {settings.base} pools by {' and '.join(map(str, modes)) or 'nothing'}; "
            f"allowed: one of {', '.join(NAMES)}; set model.pooling"
        )
    return Pooling(NAMES[modes[0]], "Normalize" in kinds)


def _read(settings: ModelSettings, path: str, name: str) -> Any:
    """A JSON file of the folder or hub model; None where there is none."""
    if Path(path).is_dir():
        file = Path(path) / name
        found = str(file) if file.is_file() else None
    else:
        from transformers.utils.hub import cached_file

        found = cached_file(
            path,
            name,
            revision=settings.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base: {settings.base}/{name} is not JSON: {error}") from None
