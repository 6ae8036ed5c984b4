"""Peak memory and time of a training step, with and without gradient checkpointing, method by method.

    python scripts/peak_memory.py --shape 135m --methods lora,prefix,full --rows 8 --tokens 128
    python scripts/peak_memory.py --shape 1.1b --methods lora,prefix --rows 4 --tokens 256 --dtype bfloat16

Random Llama-shaped models, each measured in a process of its own. Main memory of the process: with the model
loaded, and at most during the steps (the kernel's high-water mark, Linux).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fedcustom.core import environment
from fedcustom.data.examples import LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.data.tokens import TokenizedExample
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods import Context, WeightTuning, build_method, registry
from fedcustom.models.checkpointing import checkpointing
from fedcustom.models.configuration import locate
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.training.settings import TrainingSettings

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 8192},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
"""Llama shapes: SmolLM2-135M's and TinyLlama-1.1B's among them."""

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 8},
    "prefix": {"name": "prefix", "kind": "memory"},
    "kv": {"name": "prefix", "kind": "kv"},
    "adapter": {"name": "adapter"},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit", "norms": True},
    "soft_prompt": {"name": "soft_prompt"},
    "full": {"name": "full"},
}


def main() -> None:
    """Measure, and print a table; or, as the child, measure one method."""
    parser = argparse.ArgumentParser(description="Peak memory of a training step, method by method.")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--methods", default="lora,prefix,kv,adapter,ia3,bitfit,soft_prompt,full")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("int8", "int4", "nf4"))
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "METHOD", "CHECKPOINTING"))
    arguments = parser.parse_args()
    if arguments.child:
        folder, method, switched = arguments.child
        print(json.dumps(measured(folder, method, switched == "on", arguments)))
        return
    print(
        "| method | most, loading | loaded | most, kept | most, checkpointed "
        "| seconds, checkpointed to kept |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = random_model(Path(place), SHAPES[arguments.shape])
        for method in arguments.methods.split(","):
            plain, less = (child(folder, method, switched) for switched in ("off", "on"))
            sizes = [plain["loading"], plain["loaded"], plain["most"], less["most"]]
            shown = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
            print(f"| {method} | {shown} | {less['seconds'] / plain['seconds']:.2f} |", flush=True)


def random_model(folder: Path, shape: dict[str, int]) -> Path:
    """A model of random weights in bfloat16, with the tokenizer of ``builtin:lm``."""
    import transformers

    torch.manual_seed(0)
    configuration = transformers.LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("builtin:lm")) / name, folder)
    return folder


def child(folder: Path, method: str, switched: str) -> dict[str, float]:
    """The figures of one method, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(folder), method, switched]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, checkpointing {switched}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(folder: str, name: str, switched: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Memory before and during some steps of one client, and the median seconds of a step."""
    settings = registry.settings_of(METHODS[name]["name"])(**METHODS[name])
    model = ModelSettings(base=folder, dtype=arguments.dtype, quantization=arguments.quantization)
    method = build_method(settings, context(load_base(model, TASK, 0)))
    assert isinstance(method, WeightTuning)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 8000, (arguments.rows, arguments.tokens), generator=generator)
    half = arguments.tokens // 2
    rows = [TokenizedExample.of(row[:half].tolist(), row[half:].tolist(), 0) for row in ids]
    parameters = list(method.trainable.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    loaded = environment.held_memory(torch.device("cpu"))
    loading = environment.peak_memory()
    environment.restart_peak_memory()
    seconds = []
    with checkpointing(method.trainable.model) if switched else nullcontext():
        for _ in range(arguments.steps):
            begun = time.perf_counter()
            method.objective.loss(method.trainable.model, method.objective.collate(rows)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - begun)
    most = environment.peak_memory()
    return {"loading": loading, "loaded": loaded, "most": most, "seconds": statistics.median(seconds)}


TASK = LearningTask("generation")


def context(base: Any) -> Context:
    """What a method needs to know, with default settings."""
    from fedcustom.aggregation.settings import AggregationSettings

    return Context(
        base=base,
        data=DataSettings(task="generation"),
        training=TrainingSettings(learning_rate=1e-4),
        aggregation=AggregationSettings(),
        evaluation=EvaluationSettings(max_new_tokens=2),
        rounds=1,
        seed=0,
    )


if __name__ == "__main__":
    main()
