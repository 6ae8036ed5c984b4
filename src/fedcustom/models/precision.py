"""The precision of forward and backward passes where a recipe leaves it to the machine (``model.dtype =
"auto"``): float32, or bfloat16 where the processor is clearly faster with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ..core import environment
from ..core.cache import cache_folder, private
from ..core.errors import RunError
from ..core.files import read_json, write_json
from .configuration import context_length

Precision = Literal["float32", "bfloat16"]
BOTH: tuple[Precision, Precision] = ("float32", "bfloat16")

CLEARLY = 0.8
"""bfloat16 is chosen below this share of float32's time; float32 is the safer choice."""

MOST_TOKENS = 1024
"""Tokens of a measured batch."""

FOLDER = "precision"
"""The part of the cache folder with what was measured."""


def step_seconds(model: Any, device: torch.device, rows: int, tokens: int) -> dict[Precision, float]:
    """Seconds of a training step in each precision on this machine, measured once: they are kept in the cache
    folder by processor, threads, version of PyTorch, the model's configuration, and the shape of a batch.

    Args:
        model: the loaded model, in float32.
        device: where it lies.
        rows: rows of a batch; as many are measured as :data:`MOST_TOKENS` allow.
        tokens: tokens of a row.
    """
    tokens = min(tokens, context_length(model.config) or tokens)
    rows = max(1, min(rows, MOST_TOKENS // tokens))
    file = cache_folder() / FOLDER / f"{_key(model, device, rows, tokens)}.json"
    if (known := _known(file)) is not None:
        return known
    measured = measure(model, device, rows, tokens)
    with contextlib.suppress(OSError):  # then the next run measures again
        private(file.parent)
        write_json(file, measured)
    return measured


def measure(model: Any, device: torch.device, rows: int, tokens: int) -> dict[Precision, float]:
    """Seconds of a forward and a backward pass through the loaded model in each precision: the shortest of
    two steps after a first that is not counted.

    Whole steps, since a fast matrix product says little of what stands between the products.
    """
    embed = model.get_input_embeddings()
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    other = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    seconds: dict[Precision, float] = {}
    for precision in BOTH:
        steps = []
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for _ in range(3):
                begun = time.perf_counter()
                states = embed(ids).detach().requires_grad_()
                output = model(inputs_embeds=states, **other)[0].float().sum()
                torch.autograd.grad(output, states)[0].sum().item()
                steps.append(time.perf_counter() - begun)
        seconds[precision] = min(steps[1:])
    return seconds


def faster(seconds: Mapping[Precision, float]) -> Precision:
    """bfloat16 where it wins clearly."""
    return "bfloat16" if seconds["bfloat16"] < CLEARLY * seconds["float32"] else "float32"


def _key(model: Any, device: torch.device, rows: int, tokens: int) -> str:
    """The digest of what the seconds depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    machine = [environment.processor(), os.cpu_count(), torch.get_num_threads(), str(device), gpu]
    about = [*machine, torch.__version__, model.config.to_json_string(), rows, tokens]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _known(file: Path) -> dict[Precision, float] | None:
    """What was measured before; None where nothing was, or the file is damaged."""
    try:
        found = read_json(file)
        return {precision: float(found[precision]) for precision in BOTH}
    except (RunError, OSError, ValueError, KeyError, TypeError):
        return None
