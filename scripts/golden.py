"""Records what runs come to, and compares it after a change that is to change nothing, bit for bit.

    python scripts/golden.py record runs/golden.json
    python scripts/golden.py compare runs/golden.json

Tiny models and texts are made from seeds; every method runs for two or three rounds, in process, with what
acts on updates beside it: compression, server optimisers, robust rules, simulated attacks, late and absent
clients, baselines, personal parts. Recorded are digests of all tensors and lines that a run leaves behind but
times, and figures in full. Only the command line's Python calls, the recipe's schema and the files of a run
directory are used, so that it runs on either side of any change inside. Bits depend on the machine and on the
versions of libraries: record and compare on the same one. ``--minilm`` adds runs on ``builtin:minilm`` (a few
minutes), and ``--commands`` a deployed run over loopback and an experiment, by the command line. ``--only``
picks runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TIMES = ("seconds", "peak_memory_bytes", "started", "digest")
"""Keys of what differs between two runs of the same code (a recipe's digest, by the folder of its data)."""


def lora_variants() -> list[str]:
    """The variants of LoRA beside the default one, as the recipe of the code at hand has them."""
    import fedcustom

    variant = fedcustom.Recipe.model_json_schema()["$defs"]["LoraSettings"]["properties"]["variant"]
    return [name for name in variant["enum"] if name != variant["default"]]


METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "adapter": {"name": "adapter", "width": 6},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
    "prefix": {"name": "prefix", "kind": "kv", "length": 4},
    "prefix-matched": {"name": "prefix", "kind": "kv", "length": 4, "merging": "matched"},
    "prefix-stacked": {"name": "prefix", "kind": "kv", "length": 4, "merging": "stacked"},
    "prefix-reparametrised": {"name": "prefix", "length": 4, "reparametrise": True},
    "soft-prompt": {"name": "soft_prompt", "length": 4},
    "soft-prompt-mlp": {"name": "soft_prompt", "length": 4, "encoder": "mlp"},
    "lora": {"name": "lora", "rank": 4},
    "lora-dora": {"name": "lora", "rank": 4, "dora": True},
    **{f"lora-{variant}": {"name": "lora", "rank": 4, "variant": variant} for variant in lora_variants()},
    "probe": {"name": "probe"},
}

DECODED = ("full", "prefix", "soft-prompt", "lora", "lora-flora", "ia3", "adapter", "bitfit")
"""Methods that are run on a decoder too."""

SGD = {"training.optimizer": "sgd", "training.clip_norm": 0, "training.learning_rate": 0.1}

VARIATIONS: dict[str, dict[str, Any]] = {
    "balanced": {"rounds.count": 6, "rounds.clients_per_round": 2, "rounds.selection": "balanced",
                 "training.fit_head_rounds": [1, -1]},
    "fitted": {"rounds.count": 6, "rounds.clients_per_round": 2},
    "searched": {"rounds.count": 9, "training.learning_rate": "auto"},
    "centralised": {"baseline": "centralised"},
    "local": {"baseline": "local"},
    "dirichlet": {"clients.partition": "dirichlet", "clients.alpha": 0.3, "clients.count": 5},
    "int8": {"compression.kind": "int8", "compression.down": True, "compression.error_feedback": True},
    "top-k": {"compression.kind": "top_k", "compression.error_feedback": True},
    "fedadam": {"aggregation.server_optimizer": "fedadam"},
    "scaffold": {"aggregation.correction": "scaffold", **SGD},
    "feddyn": {"aggregation.correction": "feddyn", **SGD},
    "multi-krum": {"aggregation.rule": "multi_krum", "attack.kind": "sign_flip"},
    "geometric-median": {"aggregation.rule": "geometric_median", "attack.kind": "random"},
    "fedprox": {"training.proximal": 0.1},
    "late": {"participation.buffer": 2, "participation.latency": "lognormal"},
    "absent": {"participation.dropout": 0.3, "rounds.count": 4},
    "personal": {"personalisation.keep": ["head"], "personalisation.finetune_epochs": 1},
    "backdoor": {"attack.kind": "backdoor", "attack.boost": 2.0},
    "noise": {"noise.labels": 0.3},
}  # fmt: skip


PROMPTS: dict[str, dict[str, Any]] = {
    "selection": {"examples": 6, "edits": 2, "breed": 2, "breed_every": 1},
    "black_box": {"prompt_length": 3, "dimensions": 6, "local_generations": 2, "examples": 6},
}


def recipes(folder: Path, *, minilm: bool) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The name, recipe and overrides of every run."""
    import torch

    from helpers.rows import make_rows, write_jsonl
    from helpers.tiny_models import tiny_model, tiny_tokenizer

    models, data = {}, folder / "data"
    for kind in ("bert", "llama"):
        torch.manual_seed(11)
        models[kind] = str(folder / kind)
        tiny_model(kind).save_pretrained(models[kind])
        tiny_tokenizer().save_pretrained(models[kind])
    data.mkdir()
    numbered = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(224, 0))]
    for name, part in {
        "train": numbered[:160],
        "development": numbered[160:184],
        "test": numbered[184:],
    }.items():
        write_jsonl(data / f"{name}.jsonl", part)
    common: dict[str, Any] = {
        "data": {"source": str(data), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "site"},
        "training": {"batch_size": 8},
        "rounds": {"count": 2},
        "evaluation": {"batch_size": 32},
    }
    encoder = {**common, "model": {"base": models["bert"]}}
    written = {"task": "generation", "max_target_length": 16}
    decoder = {**common, "model": {"base": models["llama"]}, "data": {**common["data"], **written},
               "evaluation": {"batch_size": 32, "max_new_tokens": 8}}  # fmt: skip
    for name, method in METHODS.items():
        yield f"encoder/{name}", {**encoder, "method": method}, {}
    for name in DECODED:
        more = {"norms": True} if name == "bitfit" else {}  # it has no biases
        yield f"decoder/{name}", {**decoder, "method": {**METHODS[name], **more}}, {}
    for name, overrides in VARIATIONS.items():
        for method in ("prefix", "lora"):
            yield f"{name}/{method}", {**encoder, "method": METHODS[method]}, overrides
    public = {**encoder, "public": {"fraction": 0.25}}
    clients = [models["bert"], models["llama"]]
    for direction in ("both", "up", "down"):
        method = {"name": "distillation", "client_models": clients, "direction": direction}
        yield f"distillation/{direction}", {**public, "method": method}, {"training.learning_rate": 3e-3}
    untrained = {**{k: v for k, v in encoder.items() if k != "training"}, "model": {"base": models["llama"]}}
    asks = {"name": "prompt_engineering", "instructions": ["{input} :", "text {input} near"]}
    for strategy, more in PROMPTS.items():
        yield f"prompt/{strategy}", {**untrained, "method": {**asks, "strategy": strategy, **more}}, {}
    found = {"source": str(data), "task": "retrieval", "test": "test", "prompt": "{text}",
             "target": "{target}", "max_length": 16, "max_target_length": 24}  # fmt: skip
    searched = {"model": {"base": models["bert"]}, "data": found, "rounds": {"count": 1},
                "clients": {**common["clients"], "test_fraction": 0.0}}  # fmt: skip
    for train in ("none", "lora"):
        method = {"name": "retrieval", "chunk_length": 12, "chunk_overlap": 4, "train": train}
        yield f"retrieval/{train}", {**searched, "method": method}, {}
    if minilm:
        words = {"source": "builtin:docstrings", "max_length": 16}
        real = {**common, "data": words, "model": {"base": "builtin:minilm"},
                "clients": {"partition": "natural", "limit": 40}}  # fmt: skip
        for name in ("prefix", "lora"):
            yield f"minilm/{name}", {**real, "method": METHODS[name]}, {"rounds.count": 5}


def commands(folder: Path, recipe: dict[str, Any]) -> Iterator[tuple[str, list[str], Path]]:
    """The name, arguments and result folder of what the command line is asked for."""
    import tomli_w

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {**recipe, "clients": {"partition": "iid", "count": 3},
             "training": {"batch_size": 8, "cohort_width": 1, "local_steps": 3},
             "rounds": {"count": 6}}  # fmt: skip
    (folder / "deployed.toml").write_text(tomli_w.dumps(alone))
    yield (
        "command/deployed",
        ["deploy", "local", str(folder / "deployed.toml"), "--port", str(port),
         "--out", str(folder / "deployed")],
        folder / "deployed",
    )  # fmt: skip
    grid = {"seeds": [0, 1], "base": recipe,
            "axes": {"method": {name: {"method": METHODS[name]} for name in ("prefix", "lora")},
                     "training": {"federated": {}, "centralised": {"baseline": "centralised"}}},
            "search": {"axis": "method", "at": {"training": "federated"},
                       "rates": {"prefix": [0.01, 0.03], "lora": [0.002, 0.01]}},
            "report": {"rows": ["method"], "columns": "training"}}  # fmt: skip
    (folder / "grid.toml").write_text(tomli_w.dumps(grid))
    results = folder / "results"
    yield (
        "command/experiment",
        ["experiment", str(folder / "grid.toml"), "--runs", str(folder / "runs" / "grid"),
         "--results", str(results)],
        results,
    )  # fmt: skip


def described(directory: Path) -> dict[str, str]:
    """What a run left behind, by file: a digest of tensors, JSON without times, other text as it is."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.suffix == ".safetensors":
            digest = hashlib.sha256()
            for key, array in sorted(load_file(path).items()):
                digest.update(f"{key} {array.dtype} {array.shape}".encode() + array.tobytes())
            found[name] = digest.hexdigest()
        elif path.name in ("summary.json", "state.json", "search.json", "prompt.json", "retrieval.json"):
            found[name] = json.dumps(timeless(json.loads(path.read_text())), sort_keys=True)
        elif path.suffix == ".json" and "metrics" in (kept := json.loads(path.read_text())):
            found[name] = json.dumps({key: kept[key] for key in ("metrics", "clients") if key in kept})
        elif path.name == "tables.md":
            lines = path.read_text().partition("### Costs")[0].splitlines()
            found[name] = "\n".join(line for line in lines if not line.startswith("Machine:"))
        elif path.name in ("metrics.jsonl", "predictions.jsonl"):
            rows = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
            found[name] = json.dumps(rows, sort_keys=True)
    return found


def timeless(value: Any) -> Any:
    """JSON without what differs between two runs of the same code, at any depth."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def recorded(folder: Path, *, minilm: bool, asked: bool, only: str) -> dict[str, dict[str, str]]:
    """What every run came to; one that is refused, with the reason."""
    import fedcustom

    found, first = {}, None
    for name, recipe, overrides in recipes(folder, minilm=minilm):
        first = first or recipe
        if only not in name:
            continue
        out = folder / "runs" / name.replace("/", "-")
        try:
            fedcustom.run(recipe, overrides, out=out)
            found[name] = {key: text.replace(str(folder), "") for key, text in described(out).items()}
        except fedcustom.FedcustomError as error:
            found[name] = {"refused": str(error).replace(str(folder), "")}
        print(f"{name}: {found[name].get('refused', f'{len(found[name])} files')}", file=sys.stderr)
    for name, arguments, out in commands(folder, first or {}) if asked else ():
        if only in name:
            subprocess.run([sys.executable, "-m", "fedcustom", *arguments], check=True, stdout=sys.stderr)
            found[name] = {key: text.replace(str(folder), "") for key, text in described(out).items()}
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON with what was recorded")
    parser.add_argument("--minilm", action="store_true", help="runs on builtin:minilm too")
    parser.add_argument("--commands", action="store_true", help="a deployed run and an experiment too")
    parser.add_argument("--only", default="", help="only runs whose names hold this text")
    given = parser.parse_args()
    before: dict[str, dict[str, str]] = {}
    if given.what == "compare":
        if not given.file.is_file():
            parser.error(f"{given.file}: no such file; record it first")
        try:
            before = json.loads(given.file.read_text(encoding="utf-8"))
        except ValueError as error:
            parser.error(f"{given.file}: not a record: {error}")
    with tempfile.TemporaryDirectory() as folder:
        found = recorded(Path(folder), minilm=given.minilm, asked=given.commands, only=given.only)
    if not found:
        parser.error(f"--only {given.only}: no run has that in its name")
    if given.what == "record":
        given.file.parent.mkdir(parents=True, exist_ok=True)
        given.file.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{given.file}: {len(found)} runs")
        return
    groups = {"minilm": given.minilm, "command": given.commands}
    recorded_runs = len(before)
    before = {
        name: files
        for name, files in before.items()
        if given.only in name and groups.get(name.partition("/")[0], True)
    }
    differing = [
        f"{name}: {file}"
        for name in sorted(before.keys() | found.keys())
        for file in sorted(before.get(name, {}).keys() | found.get(name, {}).keys())
        if before.get(name, {}).get(file) != found.get(name, {}).get(file)
    ]
    left_out = recorded_runs - len(before)
    counted = f"{len(found)} runs, {len(differing)} files differ"
    counted += (
        f"; {left_out} recorded runs were not asked for (--only, --minilm, --commands)" if left_out else ""
    )
    print("\n".join([*differing, counted]))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
