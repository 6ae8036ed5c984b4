"""What a new recipe starts from: a method and short training for each task."""

from __future__ import annotations

from typing import Any

from ..data.settings import TaskKind

STARTING_METHOD: dict[TaskKind, str] = {
    "classification": "lora",
    "generation": "lora",
    "chat": "lora",
    "preference": "lora",
    "retrieval": "retrieval",
}
"""The method of a recipe that is proposed for a task."""

STARTING_SETTINGS: dict[TaskKind, dict[str, dict[str, Any]]] = {
    "classification": {"rounds": {"count": 10}},
    "generation": {"rounds": {"count": 5}, "training": {"local_steps": 10, "batch_size": 8}},
    "chat": {"rounds": {"count": 5}, "training": {"local_steps": 10, "batch_size": 8}},
    "preference": {"rounds": {"count": 5}, "training": {"local_steps": 10, "batch_size": 4}},
    "retrieval": {"rounds": {"count": 1}},
}
"""Rounds and local training of that recipe: enough to see whether it learns, and short on a processor."""
