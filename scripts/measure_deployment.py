"""Measure a deployed federation on this machine: overhead of a round, and memory with large messages.

    python scripts/measure_deployment.py overhead          # three sites, a tiny model, 20 rounds
    python scripts/measure_deployment.py memory            # two sites, a model of 500 MB in full

Prints JSON with the machine's name. The figures stand in docs/deployment.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fedcustom.core import environment
from fedcustom.deployment.local import local_sites, prepare
from fedcustom.deployment.run import run_deployed
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe
from helpers.byte_level import byte_level_tokenizer

WORDS = (
    "the",
    "a",
    "small",
    "old",
    "house",
    "river",
    "garden",
    "bread",
    "sees",
    "likes",
    "near",
    "with",
    "and",
)


def write_data(folder: Path, rows: int) -> None:
    """Short texts whose label is the word that decides."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(rows):
        words = generator.choice(WORDS, 6).tolist()
        lines.append(json.dumps({"text": " ".join(words), "label": "yes" if "house" in words else "no"}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def write_model(folder: Path, width: int, layers: int, vocabulary: int) -> None:
    """A random GPT-2 with a byte-level tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    byte_level_tokenizer(WORDS).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=width // 64, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


class Clock(Callback):
    """A progress that notes when rounds end."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.trained: list[float] = []

    def on_round_end(self, row: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())
        print(row["round"], row["seconds"], flush=True)

    def on_note(self, text: str) -> None:
        print(text, flush=True)


class Peaks:
    """Peak resident memory, by kind of process, while a run goes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peaks, self._ended = str(folder), dict[str, int](), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            together = 0
            for process in Path("/proc").iterdir():
                if not process.name.isdigit():
                    continue
                try:
                    line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    status = (process / "status").read_text()
                except OSError:
                    continue
                kind = self._kind(int(process.name), line)
                if kind and "VmHWM" in status:
                    self._note(kind, _kilobytes(status, "VmHWM:") * 1024)
                    if kind.startswith("server"):
                        together += _kilobytes(status, "VmRSS:") * 1024
            self._note("server, all processes at one time", together)

    def _note(self, kind: str, found: int) -> None:
        self.peaks[kind] = max(self.peaks.get(kind, 0), found)

    def _kind(self, pid: int, line: str) -> str:
        if pid == os.getpid():
            return "server, the run"
        if self.folder not in line:
            return ""
        names = {
            "server.runner_process": "server, the engine's job", "server_train": "server, the engine",
            "client.worker_process": "site, the engine's job", "client_train": "site, the engine",
            "fedcustom.deployment.site": "site, resident",
        }  # fmt: skip
        return next((kind for word, kind in names.items() if word in line), "")


def _kilobytes(status: str, key: str) -> int:
    return int(status.split(key)[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["overhead", "memory"])
    parser.add_argument("--port", type=int, default=8760)
    parser.add_argument("--rounds", type=int)
    chosen = parser.parse_args()
    tiny = chosen.what == "overhead"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, 60)
        size = {"width": 64, "layers": 2, "vocabulary": 400}
        if not tiny:
            size = {"width": 768, "layers": 12, "vocabulary": 50257}
        # in a process of its own, whose memory does not count as the server's
        making = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(folder / "model",), kwargs=size
        )
        making.start()
        making.join()
        recipe = load_recipe(
            {
                "model": {"base": str(folder / "model")},
                "data": {"source": str(folder), "max_length": 16},
                "clients": {"partition": "iid", "count": 3 if tiny else 2},
                "method": {"name": "bitfit" if tiny else "full"},
                "training": {"batch_size": 4, "local_steps": 1, "optimizer": "sgd", "learning_rate": 0.01},
                "rounds": {"count": chosen.rounds or (20 if tiny else 3)},
                "evaluation": {"every": 1000, "untuned": False},
            }
        )
        prepare(resolved(recipe), folder / "federation", chosen.port)
        clock = Clock()
        with Peaks(folder) as peaks, local_sites(folder / "federation"):
            summary = run_deployed(recipe, folder / "federation", folder / "run", callbacks=[clock])
        rounds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        found = {
            "machine": environment.describe()["processor"],
            "cores": os.cpu_count(),
            "sites": 3 if tiny else 2,
            "bytes up a site and round": summary["bytes"]["up_per_client_round"],
            "seconds a round, median": round(statistics.median(rounds[:-1] or rounds), 3),
            "seconds a round, all": [round(value, 3) for value in rounds],
            "peak memory in bytes": dict(sorted(peaks.peaks.items())),
        }
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
