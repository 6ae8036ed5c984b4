"""Where the time of a round goes: by phase, and by kind of operation."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fedcustom.driver import run_recipe
from fedcustom.methods.objective import Supervised
from fedcustom.recipe import load_recipe

from .ours import Stopwatch

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "softmax"),
    "activations": ("gelu", "silu", "sigmoid", "tanh"),
    "normalisation": ("layer_norm", "rms_norm"),
    "copying and gathering": ("copy_", "cat", "index", "_index_put", "fill_", "clone", "embedding"),
}


class Phases:
    """Seconds of forward passes, backward passes and optimiser steps, without what is nested."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds its seconds to a phase."""

        def call(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - begun

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile, everything that trains is timed."""
        places: list[tuple[Any, str, str]] = [
            (Supervised, "row_losses", "forward"), (Supervised, "loss", "forward"),
            (torch.Tensor, "backward", "backward"), (torch.optim.AdamW, "step", "optimiser"),
        ]  # fmt: skip
        before = [getattr(owner, name) for owner, name, _ in places]
        for (owner, name, phase), function in zip(places, before, strict=True):
            setattr(owner, name, self.timed(phase, function))
        try:
            yield
        finally:
            for (owner, name, _), function in zip(places, before, strict=True):
                setattr(owner, name, function)


def kinds(profiler: Any) -> dict[str, float]:
    """Shares of the time by kind of operation; what is left is small operations and Python."""
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            kind = "everything else"
        else:
            name = event.key.removeprefix("aten::")
            kind = next((k for k, names in KINDS.items() if _is(name, k, names)), "everything else")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {kind: seconds / total for kind, seconds in spent.items()}


def _is(name: str, kind: str, known: tuple[str, ...]) -> bool:
    if kind == "matrix products":
        return name in known
    return any(part in name for part in known)


def product_peak(size: int = 1536, repetitions: int = 5) -> float:
    """GFLOP/s of one large float32 matrix product on this machine."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repetitions):
        begun = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e9


def measure(job: Path) -> dict[str, Any]:
    """Our engine on a job: once with phases, once under torch's profiler with floating-point operations
    counted.
    """
    recipe, found = load_recipe(job / "recipe.toml"), Phases()
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch()
        with found.watching():
            run_recipe(recipe, Path(folder) / "phases", progress=watch)
        whole = sum(watch.seconds)
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
            run_recipe(recipe, Path(folder) / "kinds")
    shares = {name: seconds / whole for name, seconds in found.seconds.items()}
    products = sum(event.flops for event in profiler.key_averages()) / 1e9
    return {
        "seconds": whole,
        "rounds": len(watch.seconds),
        "phases": {**shares, "federated overhead": 1 - sum(shares.values())},
        "kinds": kinds(profiler),
        "gigaflop": products,
        "peak_gigaflop_per_second": product_peak(),
    }


def main() -> None:
    """``python -m benchmarks.profile JOB OUT``."""
    parser = argparse.ArgumentParser(description="Where the time of a job goes")
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(json.dumps(measure(options.job), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
