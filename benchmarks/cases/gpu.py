"""(f) On a GPU: Llamas of random weights in bfloat16 and nf4, sixteen clients together or one by one."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.core.errors import FedcustomError
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods.messages import Work
from fedcustom.methods.protocol import Client
from fedcustom.methods.registry import build_method, settings_of
from fedcustom.methods.tuning.method import WeightTuning
from fedcustom.methods.tuning.technique import Context
from fedcustom.models.load import load_base
from fedcustom.models.quantised_layers import count_weights
from fedcustom.models.settings import ModelSettings
from fedcustom.training.settings import TrainingSettings

from ..harness import spread
from ..jobs import write_random_gpt2

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "TinyLlama-1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "prefix memory": {"name": "prefix", "kind": "memory"},
}


@dataclass(frozen=True)
class Measurement:
    """One line of the table: a model's shape, how its frozen matrices are stored, a method, rows a step."""

    shape: str
    quantization: str | None
    method: str
    batch_size: int

    @property
    def name(self) -> str:
        """As in ``TinyLlama-1.1B, bfloat16, lora, batch 4``."""
        return f"{self.shape}, {self.quantization or 'bfloat16'}, {self.method}, batch {self.batch_size}"


def planned(shapes: tuple[str, ...] = ("TinyLlama-1.1B", "SmolLM2-135M", "Llama-2-7B")) -> list[Measurement]:
    """What is measured, the most wanted first."""
    stored = {shape: (None, "nf4") if shape == "Llama-2-7B" else (None,) for shape in shapes}
    return [
        Measurement(shape, quantization, method, batch_size)
        for shape in shapes
        for quantization in stored[shape]
        for method in METHODS
        for batch_size in ((1, 4) if quantization is None else (4,))
    ]


def missing() -> str | None:
    """Why the case is skipped, if it is."""
    return None if torch.cuda.is_available() else "skipped: this machine has no GPU that torch can use"


def measure(
    folder: Path,
    *,
    plan: list[Measurement] | None = None,
    device: str = "cuda",
    clients: int = 16,
    steps: int = 4,
    tokens: int = 512,
    repetitions: int = 3,
    seconds: float = 360.0,
) -> dict[str, Any]:
    """Tokens a second of a round, together and one by one, the share of the matrix-product peak, and peak
    memory. No measurement begins after so many ``seconds``; what was left out is named. One that fails says
    why, and the others go on.
    """
    begun, plan = time.perf_counter(), plan or planned()
    found: dict[str, Any] = {"matmul_teraflop_per_second": _peak(device), "rows": {}, "left_out": []}
    for one in plan:
        if time.perf_counter() - begun > seconds:
            found["left_out"].append(one.name)
            continue
        print(f"  {one.name}", file=sys.stderr, flush=True)
        try:
            row = _measured(one, folder, device, clients, steps, tokens, repetitions)
            row["share_of_peak"] = row["teraflop_per_second"] / found["matmul_teraflop_per_second"]
        except (FedcustomError, RuntimeError) as error:  # out of memory is a RuntimeError
            row = {"problem": str(error).splitlines()[0]}
        found["rows"][one.name] = row
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _measured(
    one: Measurement, folder: Path, device: str, clients: int, steps: int, tokens: int, repetitions: int
) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    base = _base(one, folder, device)
    numbers = count_weights(base.model)
    method = _method(base, one, steps, tokens)
    words = " ".join(f"w{i % 900}" for i in range(tokens - 2))
    examples = [Example("w1", target=f" {words}") for _ in range(one.batch_size * steps)]
    people = [Client(f"c{i}", ClientData(f"c{i}", examples)) for i in range(clients)]
    tasks = method.configure(method.initialise(), 1, {client.name: Work(steps=steps) for client in people})
    pairs = [(tasks[client.name], client) for client in people]
    work = clients * steps * one.batch_size * tokens
    rates: dict[str, list[float]] = {"together": [], "one by one": []}
    peaks: dict[str, int] = {}
    for number in range(repetitions + 1):
        for name in rates:
            begun = _now(device)
            if name == "together":
                answers = method.execute_together(pairs)
                if failed := next((each for each in answers if isinstance(each, Exception)), None):
                    raise failed
            else:
                for task, client in pairs:
                    method.execute(task, client)
            elapsed = _now(device) - begun
            if device == "cuda":
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
            if number:  # the first one warms up
                rates[name].append(work / elapsed)
    # Forward, and backward through frozen matrices: two operations a weight and token each.
    together = spread(rates["together"])
    return {
        "tokens_per_second": {"together": together, "one by one": spread(rates["one by one"])},
        "teraflop_per_second": 4 * numbers * together["median"] / 1e12,
        "peak_bytes": peaks,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _base(one: Measurement, folder: Path, device: str) -> Any:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = folder / one.shape
    if not place.exists():
        if not (folder / "words").exists():
            write_random_gpt2(folder / "words", vocabulary=1024, layers=1, width=8, heads=1)
        torch.manual_seed(0)
        with torch.device(device):  # billions of random numbers take minutes on a processor
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[one.shape])).bfloat16()
        model.save_pretrained(place)
        del model
        AutoTokenizer.from_pretrained(folder / "words").save_pretrained(place)
    settings = {"base": str(place), "dtype": "bfloat16", "device": device, "quantization": one.quantization}
    return load_base(ModelSettings.model_validate(settings), LearningTask("generation"), 0)


def _method(base: Any, one: Measurement, steps: int, tokens: int) -> WeightTuning:
    context = Context(
        base=base,
        data=DataSettings(task="generation", max_length=2 * tokens, max_target_length=2 * tokens),
        training=TrainingSettings(batch_size=one.batch_size, local_steps=steps, learning_rate=1e-4),
        aggregation=AggregationSettings(),
        evaluation=EvaluationSettings(),
        rounds=1,
        seed=0,
    )
    given = METHODS[one.method]
    method = build_method(settings_of(given["name"]).model_validate(given), context)
    assert isinstance(method, WeightTuning)
    return method


def _peak(device: str) -> float:
    """Tera-operations a second of one large bfloat16 product."""
    size, repetitions = (8192, 20) if device == "cuda" else (512, 2)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    left @ right
    begun = _now(device)
    for _ in range(repetitions):
        left @ right
    return repetitions * 2 * size**3 / (_now(device) - begun) / 1e12


def main() -> None:
    """``python -m benchmarks.cases.gpu FOLDER [--dry-run]``: measure, and print the JSON."""
    parser = argparse.ArgumentParser(description="Cohorts on a GPU, or a dry run of tiny models on a CPU.")
    parser.add_argument("folder", type=Path, help="for the random models (20 GB)")
    parser.add_argument("--seconds", type=float, default=360.0, help="no measurement begins later")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        plan = [*planned(("tiny",)), Measurement("tiny", "nf4", "lora", 4)]
        small = {"clients": 2, "steps": 1, "tokens": 16, "repetitions": 1}
        print(json.dumps(measure(options.folder, plan=plan, device="cpu", **small), indent=1))
        return
    print(json.dumps(missing() or measure(options.folder, seconds=options.seconds), indent=1))


if __name__ == "__main__":
    main()
