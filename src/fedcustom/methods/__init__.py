"""Customisation methods, one package each, behind one protocol of five verbs.

Names are imported on first use: settings need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .messages import Messages, RoundTask, Task, TrainingTask, Update, Work, message_kinds
    from .protocol import (
        UNFINISHED,
        Aggregate,
        Answer,
        Asked,
        AsksClients,
        ChecksTasks,
        Client,
        CountsCuts,
        Memory,
        Method,
        Prompts,
        ScalesLogits,
        State,
        WritesTexts,
        peeked,
    )
    from .registry import build_method
    from .tuning.head_fit import client_labels
    from .tuning.method import WeightTuning
    from .tuning.technique import Context, Technique

__all__ = [
    "UNFINISHED",
    "Aggregate",
    "Answer",
    "Asked",
    "AsksClients",
    "ChecksTasks",
    "Client",
    "Context",
    "CountsCuts",
    "Memory",
    "Messages",
    "Method",
    "Prompts",
    "RoundTask",
    "ScalesLogits",
    "State",
    "Task",
    "Technique",
    "TrainingTask",
    "Update",
    "WeightTuning",
    "Work",
    "WritesTexts",
    "build_method",
    "client_labels",
    "message_kinds",
    "peeked",
]

_ELSEWHERE = {
    "Context": "tuning.technique",
    "Technique": "tuning.technique",
    "WeightTuning": "tuning.method",
    "build_method": "registry",
    "client_labels": "tuning.head_fit",
    **dict.fromkeys(
        ("Messages", "RoundTask", "Task", "TrainingTask", "Update", "Work", "message_kinds"), "messages"
    ),
}
"""Where names are that are not in ``protocol``."""


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ELSEWHERE.get(name, 'protocol')}", __name__), name)
