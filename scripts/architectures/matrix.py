"""One cell of the architecture matrix: a method on a model, trained through ``fedcustom.run`` in two ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import fedcustom
from fedcustom.core.errors import FedcustomError
from fedcustom.federated.run_directory import Checkpoints

from .models import WORDS, kind_of, write_model

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 2},
    "prefix": {"length": 3, "kind": "kv"},
    "prefix memory": {"length": 3, "kind": "memory"},
    "soft_prompt": {"length": 3},
    "adapter": {"width": 4},
    "ia3": {},
    "bitfit": {"norms": True},
    "ln_tuning": {},
}
"""The methods that train weights, by their names' first word, with settings that suit tiny models."""

TASKS = ("classification", "generation")

TOLERANCE = 2e-3
"""Relative distance of two runs' changes, and of their losses, that rounding explains over two rounds."""

How = Literal["together", "alone", "refused", "wrong", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: clients trained ``together`` in one batch or ``alone``, one after the other; the
    method was ``refused`` with a reason; the two ways gave ``wrong``, unlike numbers; or it ``failed`` with
    another error than a refusal. ``padding`` is false where batches hold texts of one length.
    """

    how: How
    reason: str = ""
    padding: bool = True

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


class Remarks(fedcustom.Callback):
    """Collects the notes of a run."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        """Keep one."""
        self.texts.append(text)


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that an architecture is tried with."""
    return TASKS[:1] if kind_of(name) == "encoder" else TASKS


def outcome(name: str, method: str, task: str, folder: Path, *, check: bool = False) -> Outcome:
    """Run the cell in ``folder``, in both ways, and compare. A model or data set that is there already is
    used. With ``check``, exports are loaded in a process of their own and compared (some 10 s each).
    """
    model = folder / "models" / name
    if not model.exists():
        write_model(name, model)
    recipe = recipe_for(model, method, task, data_in(folder))
    results: list[tuple[Path, Remarks]] = []
    for way, width in (("alone", 1), ("together", None)):
        out, remarks = folder / f"{name}-{task}-{method.replace(' ', '-')}-{way}", Remarks()
        training = {**recipe["training"], **({"cohort_width": width} if width else {})}
        try:
            fedcustom.run(
                {**recipe, "training": training},
                out=out,
                callbacks=[remarks],
                check_export=check and not results,
            )
        except FedcustomError as error:
            text = str(error).replace(str(model), name)
            return Outcome("refused" if "\n" not in text and not results else "failed", text)
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        results.append((out, remarks))
    (alone, _), (together, remarks) = results
    padding = not any("padding changes its results" in text for text in remarks.texts)
    if (gap := distance(alone, together)) > TOLERANCE:
        return Outcome("wrong", f"changes differ by {gap:.1e}", padding)
    one_by_one = [text for text in remarks.texts if "one after another" in text]
    if one_by_one or method == "full":
        return Outcome("alone", (one_by_one or [""])[0].replace(str(model), name), padding)
    return Outcome("together", "", padding)


def recipe_for(model: Path, method: str, task: str, data: Path) -> dict[str, Any]:
    """Three clients, two rounds of plain gradient steps."""
    generates = task == "generation"
    columns = {"prompt": "{source} :", "target": " {target}"} if generates else {}
    return {
        "model": {"base": str(model)},
        "data": {
            "source": str(data), "task": task, "test": "test", "max_length": 24, "max_target_length": 12,
            **columns,
        },
        "clients": {"partition": "iid", "count": 3},
        "method": {"name": method.partition(" ")[0], **METHODS[method]},
        "training": {
            "batch_size": 3, "optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 1.0,
            **({} if generates else {"fit_head": False, "label_skew": "none"}),
        },
        "rounds": {"count": 2},
        "evaluation": {"max_new_tokens": 3},
    }  # fmt: skip


def data_in(folder: Path) -> Path:
    """Texts of unlike lengths, whose last word is the label and the target."""
    data = folder / "data"
    if data.exists():
        return data
    data.mkdir(parents=True)
    generator, words = np.random.default_rng(0), WORDS.split()
    for split, count in (("train", 17), ("test", 5)):
        rows = []
        for _ in range(count):
            texts = [" ".join(generator.choice(words, int(generator.integers(1, 9)))) for _ in range(2)]
            label = "even" if len(texts[0]) % 2 == 0 else "odd"
            rows.append({"text": texts[0], "label": label, "source": texts[0], "target": texts[1]})
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def distance(one: Path, other: Path) -> float:
    """How far two runs are apart: their last states, relative to the clients' changes, or their losses, if
    those are farther apart.
    """
    states = [Checkpoints(run / "checkpoints").load(2).state.tensors for run in (one, other)]
    gap = sum(float((t.double() - states[1][name].double()).square().sum()) for name, t in states[0].items())
    rows = [
        [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["round"]]
        for run in (one, other)
    ]
    norms = [norm for row in rows[0] for norm in row["norms"].values()]
    losses = [[row["train_loss"] for row in each] for each in rows]
    off = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(*losses, strict=True))
    return max(gap**0.5 / max(sum(norms) / len(norms), 1e-9), off)
