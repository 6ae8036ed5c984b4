"""(f) On a GPU: a Llama of 1.1 billion random weights in bfloat16, sixteen clients together or one by one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods.lora.method import Lora
from fedcustom.methods.lora.settings import LoraSettings
from fedcustom.methods.protocol import Client, Work
from fedcustom.methods.tuning.method import WeightTuning
from fedcustom.methods.tuning.technique import Context
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.training.settings import TrainingSettings

from ..harness import spread
from ..jobs import write_random_gpt2


def missing() -> str | None:
    """Why the case is skipped, if it is."""
    return None if torch.cuda.is_available() else "skipped: this machine has no GPU that torch can use"


def measure(
    folder: Path, *, clients: int = 16, steps: int = 4, tokens: int = 512, repetitions: int = 5
) -> Any:
    """Tokens a second of a round, together and one by one, and the share of the matrix-product peak."""
    base = _base(folder)
    found: dict[str, Any] = {"matmul_teraflop_per_second": _peak()}
    numbers = sum(p.numel() for p in base.model.parameters())
    for batch_size in (1, 4):
        method = _method(base, batch_size, steps)
        words = " ".join(f"w{i % 900}" for i in range(tokens - 2))
        examples = [Example("w1", target=f" {words}") for _ in range(batch_size * steps)]
        people = [Client(f"c{i}", ClientData(f"c{i}", examples)) for i in range(clients)]
        tasks = method.configure(
            method.initialise(), 1, {client.name: Work(steps=steps) for client in people}
        )
        pairs = [(tasks[client.name], client) for client in people]
        work = clients * steps * batch_size * tokens
        rates: dict[str, list[float]] = {"together": [], "one by one": []}
        for number in range(repetitions + 1):
            for name in rates:
                torch.cuda.synchronize()
                begun = time.perf_counter()
                if name == "together":
                    method.execute_together(pairs)
                else:
                    for task, client in pairs:
                        method.execute(task, client)
                torch.cuda.synchronize()
                if number:  # the first one warms up
                    rates[name].append(work / (time.perf_counter() - begun))
        together, alone = spread(rates["together"]), spread(rates["one by one"])
        # Forward, and backward through frozen matrices: two operations a weight and token each.
        teraflop = 4 * numbers * together["median"] / 1e12
        found[f"batch {batch_size}"] = {
            "tokens_per_second": {"together": together, "one by one": alone},
            "share_of_peak": teraflop / found["matmul_teraflop_per_second"],
        }
        base = _base(folder)  # a method changes its base in place
    return found


def _base(folder: Path) -> Any:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (folder / "llama").exists():
        write_random_gpt2(folder / "words", vocabulary=1024, layers=1, width=8, heads=1)
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "llama")
        AutoTokenizer.from_pretrained(folder / "words").save_pretrained(folder / "llama")
    settings = ModelSettings(base=str(folder / "llama"), dtype="bfloat16", device="cuda")
    return load_base(settings, LearningTask("generation"), 0)


def _method(base: Any, batch_size: int, steps: int) -> WeightTuning:
    context = Context(
        base=base,
        data=DataSettings(task="generation", max_length=1024, max_target_length=1024),
        training=TrainingSettings(batch_size=batch_size, local_steps=steps, learning_rate=1e-4),
        aggregation=AggregationSettings(),
        evaluation=EvaluationSettings(),
        rounds=1,
        seed=0,
    )
    return WeightTuning(Lora(LoraSettings(rank=8)), context)


def _peak(size: int = 8192) -> float:
    """Tera-operations a second of one large bfloat16 product."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    left @ right
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        left @ right
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (time.perf_counter() - begun) / 1e12


if __name__ == "__main__":
    print(json.dumps(missing() or measure(Path(sys.argv[1])), indent=1))
