"""A base model for a task that fits into the memory of this machine."""

from __future__ import annotations

from ..core.errors import ModelError
from ..data.settings import TaskKind
from ..models import smollm2

ENCODER = "builtin:minilm"

CHAT_MEMORY = 4 * 10**9
"""Bytes that training SmolLM2-135M takes with some room to spare: 2.8 GB were measured for 8 rows of 128
tokens (docs/memory.md)."""

DECODER_MEMORY = 10**9
"""Bytes below which the smallest decoder is proposed."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)
"""A chat template for models that have none of their own: roles on lines of their own, and an end token."""


def fitting_base(task: TaskKind, memory: int) -> tuple[str, str]:
    """A built-in model for a task, and why.

    Args:
        memory: bytes that a process can take on this machine.
    """
    if task in ("classification", "retrieval"):
        return ENCODER, "a small encoder"
    free = f"{memory / 1e9:.1f} GB of memory are free"
    try:
        smollm2.check_present()
    except ModelError:
        reason = "builtin:smollm2 is not installed (docs/model_types.md)"
    else:
        if memory >= CHAT_MEMORY:
            return smollm2.NAME, "a small model that was trained on conversations"
        reason = f"builtin:smollm2 needs about {CHAT_MEMORY / 1e9:.0f} GB, and {free}"
    return ("builtin:lm" if memory >= DECODER_MEMORY else "builtin:lm-small"), reason
