"""Checkpoints: weights, moments and progress."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from .optimizers import Optimizers

PROGRESS = "training.json"
"""An exported model's progress, from which training may go on."""

OPTIONS = {
    "size": "--size",
    "batch_tokens": "--batch-tokens",
    "peak_rate": "--learning-rate",
    "grow_at": "--grow-at",
    "precision": "--precision",
    "seed": "--seed",
}
"""What a run is begun with and goes on with, and its options."""


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: Optimizers, state: dict) -> None:
    """Write weights, moments and progress so that a kill at any moment leaves the old or the new
    checkpoint whole.
    """
    fresh, current, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    named = dict(model.named_parameters())
    save_file({name: p.detach().contiguous() for name, p in named.items()}, fresh / "model.safetensors")
    save_file(optimizers.state(), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(state, indent=1))
    if current.exists():  # else a kill came between the two renames, and the old one is all there is
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def save_progress(folder: Path, state: dict) -> None:
    """Write progress anew beside the weights that were saved last."""
    fresh = folder / "checkpoint" / "state.json.new"
    fresh.write_text(json.dumps(state, indent=1))
    fresh.rename(folder / "checkpoint" / "state.json")


def saved_progress(folder: Path) -> dict | None:
    """Progress of the last whole checkpoint, or None where there is none."""
    source = _last_checkpoint(folder)
    if source is None:
        return None
    state: dict = json.loads((source / "state.json").read_text())
    return state


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> None:
    """Put weights and moments of the last whole checkpoint back in place, where there is one."""
    source = _last_checkpoint(folder)
    if source is None:
        return
    weights = load_file(source / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    optimizers.restore(load_file(source / "optimizer.safetensors"))


def _last_checkpoint(folder: Path) -> Path | None:
    names = ("checkpoint", "checkpoint.old")
    return next((folder / n for n in names if (folder / n / "state.json").exists()), None)


def first_progress(begin: Path | None, layers: int) -> dict[str, Any]:
    """Progress before the first step: none, or that of the exported model ``begin``, which is then an earlier
    part.

    Raises:
        SystemExit: its file of progress is damaged, in one line.
    """
    if begin is None:
        return {"tokens": 0, "seconds": 0.0, "steps": {}, "validation": [], "layers": layers, "begun": 0}
    try:
        state: dict[str, Any] = json.loads((begin / PROGRESS).read_text(encoding="utf-8"))
        missing = {"tokens", "steps", "layers"} - state.keys()
    except (ValueError, AttributeError) as error:
        sys.exit(f"--begin: {begin / PROGRESS} is damaged: {error}")
    if missing:
        sys.exit(f"--begin: {begin / PROGRESS} is damaged: it lacks {min(missing)!r}")
    part = {key: state[key] for key in ("tokens", "planned", "machine", *OPTIONS) if key in state}
    part |= {"replanned": state.pop("replanned", [])}
    return {**state, "begun": state["tokens"], "earlier": [*state.get("earlier", []), part]}


def check_options(saved: dict[str, Any], given: dict[str, Any], out: Path) -> None:
    """Refuse to go on from a checkpoint with other options than it was begun with.

    Raises:
        SystemExit: names the option, in one line.
    """
    for key, option in OPTIONS.items():
        if key in saved and saved[key] != given[key]:
            sys.exit(
                f"{option} {given[key]}: the run in {out} was begun with {saved[key]}; "
                "give the same, or name another --out"
            )
