"""The work of a job with nothing but ``torch``, ``transformers`` and ``peft``: what a peer does at a client.

A job is a folder that :mod:`benchmarks.jobs` wrote. Peers run this file in environments of their own, so it
imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
IGNORED = -100


class Job:
    """A base model, an adapter to start from, and every batch of every client and round."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        content = json.loads((self.folder / "work.json").read_text(encoding="utf-8"))
        self.task: str = content["task"]
        self.padding: int = content["padding"]
        self.learning_rate: float = content["learning_rate"]
        self.clip_norm: float = content["clip_norm"]
        self.precision: str = content["precision"]
        self.examples: list[list[int]] = content["examples"]
        self.labels: list[int] = content["labels"]
        """Classes, or how many of an example's first tokens are no targets."""
        self.rounds: list[dict[str, Any]] = content["rounds"]
        """By round and client: ``weight`` and ``batches``, which name examples."""
        self.clients: list[str] = content["clients"]
        held_out = content.get("development", {"examples": [], "labels": []})
        self.development = range(len(self.examples), len(self.examples) + len(held_out["examples"]))
        """Numbers of the examples that nobody trains on."""
        self.examples += held_out["examples"]
        self.labels += held_out["labels"]

    def model(self) -> Any:
        """The base model with the adapter that everybody starts from; no dropout, as in the other engines."""
        import peft
        import transformers

        kind = {
            "classification": transformers.AutoModelForSequenceClassification,
            "generation": transformers.AutoModelForCausalLM,
        }[self.task]
        base: Any = kind.from_pretrained(self.folder / "model", dtype=torch.float32)
        start = str(self.folder / "start")
        config = peft.PeftConfig.from_pretrained(start)
        config.inference_mode = False
        model: Any = peft.get_peft_model(base, config)
        peft.set_peft_model_state_dict(model, peft.load_peft_weights(start, device="cpu"))
        return model.eval()

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Some examples, padded on the right."""
        rows = [self.examples[i] for i in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.padding] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        if self.task == "classification":
            labels = torch.tensor([self.labels[i] for i in chosen])
        else:
            labels = ids.masked_fill(mask == 0, IGNORED)
            for row, i in enumerate(chosen):
                labels[row, : self.labels[i]] = IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """What is trained, by its name in the wrapped model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def read(model: Any) -> State:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in parameters(model).items()}


def write(model: Any, state: Mapping[str, Tensor]) -> None:
    """Put tensors into the model."""
    with torch.no_grad():
        for name, parameter in parameters(model).items():
            parameter.copy_(state[name])


def train(model: Any, job: Job, batches: Iterable[Sequence[int]]) -> float:
    """The ordinary loop: one AdamW step a batch. Returns the mean loss over examples."""
    trained = list(parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)
    total, examples = 0.0, 0
    for chosen in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bfloat16"):
            loss = model(**job.batch(chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        total, examples = total + loss.item() * len(chosen), examples + len(chosen)
    return total / examples


def development_loss(model: Any, job: Job, batch_size: int = 8) -> float:
    """The loss on the job's development examples: the mean over their target tokens, or over examples of
    classification.
    """
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(job.development), batch_size):
            batch = job.batch(job.development[start : start + batch_size])
            targets = batch["labels"] if job.task == "classification" else batch["labels"][:, 1:]
            weight = int((targets != IGNORED).sum())
            total, count = total + model(**batch).loss.item() * weight, count + weight
    return total / count


def weighted_mean(states: Sequence[tuple[State, float]]) -> State:
    """The mean of the clients' tensors by their numbers of examples."""
    whole = sum(weight for _, weight in states)
    return {name: sum(state[name] * (weight / whole) for state, weight in states) for name in states[0][0]}  # type: ignore[misc]


class Record:
    """What an engine notes of its rounds: seconds and losses; and the adapter that it ends with."""

    def __init__(self, job: Job, folder: str | Path) -> None:
        self.job, self.folder = job, Path(folder)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.processor: list[float] = []
        self.begun = (0.0, 0.0)
        self.ended = 0.0
        """When the last round ended, in seconds since 1970."""

    def begin(self) -> None:
        """A round begins."""
        self.begun = time.perf_counter(), time.process_time()

    def end(self, losses: Sequence[tuple[float, float]]) -> None:
        """A round has ended; ``losses`` are the clients' with their weights."""
        self.seconds.append(time.perf_counter() - self.begun[0])
        self.processor.append(time.process_time() - self.begun[1])
        self.ended = time.time()
        self.losses.append(sum(loss * n for loss, n in losses) / sum(n for _, n in losses))

    def save(self, model: Any, state: State, **more: Any) -> None:
        """Write what was noted, and the adapter."""
        write(model, state)
        model.save_pretrained(str(self.folder / "model"))
        content = {
            "rounds": self.seconds,
            "processor": self.processor,
            "losses": self.losses,
            "ended": self.ended,
            **more,
        }
        (self.folder / "result.json").write_text(json.dumps(content), encoding="utf-8")
