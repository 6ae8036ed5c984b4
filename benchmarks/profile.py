"""Where the time of a round goes: by phase, and by kind of operation."""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedcustom.federated.run import run_recipe
from fedcustom.methods.tuning.objective import Supervised
from fedcustom.recipe.recipe import load_recipe

from .ours import Stopwatch

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "softmax"),
    "activations": ("gelu", "silu", "sigmoid", "tanh"),
    "normalisation": ("layer_norm", "rms_norm"),
    "copying and gathering": (
        "copy_",
        "cat",
        "index",
        "fill_",
        "clone",
        "embedding",
        "zeros",
        "scatter",
        "gather",
    ),
}


class Phases:
    """Seconds in which forward passes, backward passes and optimiser steps run, in any thread: while two run,
    each is given half.
    """

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0}
        self.running: list[str] = []
        self.since = 0.0
        self.lock = threading.Lock()

    def _change(self, begins: str = "", ends: str = "") -> None:
        with self.lock:
            now = time.perf_counter()
            for name in self.running:
                self.seconds[name] += (now - self.since) / len(self.running)
            self.since = now
            if begins:
                self.running.append(begins)
            if ends:
                self.running.remove(ends)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds its seconds to a phase."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._change(begins=name)
            try:
                return function(*arguments, **named)
            finally:
                self._change(ends=name)

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


class Kinds(TorchDispatchMode):
    """Seconds of every operation in this thread, and the floating-point operations of matrix products.

    Not torch's profiler: what that writes down comes between the tensors in memory, so that large ones need
    new pages every time, which here made some operations four times slower than they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: dict[str, float] = dict.fromkeys([*KINDS, "everything else"], 0.0)
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # an evaluation
            return function(*arguments, **(named or {}))
        begun = time.perf_counter()
        result = function(*arguments, **(named or {}))
        took = time.perf_counter() - begun
        name = function.overloadpacket.__name__
        kind = next((k for k, names in KINDS.items() if _is(name, k, names)), "everything else")
        self.seconds[kind] += took
        if kind == "matrix products":
            left = [a for a in arguments if isinstance(a, torch.Tensor)][-2]
            self.products += 2 * result.numel() * left.shape[-1]
        return result


def _is(name: str, kind: str, known: tuple[str, ...]) -> bool:
    if kind == "matrix products":
        return name.rstrip("_") in known
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
    """Our engine on a job: once with phases, once with operations timed and counted, in one thread."""
    recipe, found = load_recipe(job / "recipe.toml"), Phases()
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch()
        with found.watching():
            run_recipe(recipe, Path(folder) / "phases", callbacks=[watch])
        whole = sum(watch.seconds)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone, operations = Stopwatch(), Kinds()
        with operations:
            run_recipe(recipe, Path(folder) / "kinds", callbacks=[alone])
        torch.set_num_threads(threads)
    shares = {name: seconds / whole for name, seconds in found.seconds.items()}
    spent = operations.seconds
    spent["Python and small operations"] = max(0.0, sum(alone.seconds) - sum(spent.values()))
    total = sum(spent.values())
    return {
        "seconds": whole,
        "rounds": len(watch.seconds),
        "phases": {**shares, "federated overhead": 1 - sum(shares.values())},
        "kinds": {name: seconds / total for name, seconds in spent.items()},
        "gigaflop": operations.products / 1e9,
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
