"""A recipe proposed from data: its task, columns, clients, lengths and a base model that fits the machine."""

from __future__ import annotations

from .propose import Choices, Proposal, propose
from .questions import Question

__all__ = ["Choices", "Proposal", "Question", "propose"]
