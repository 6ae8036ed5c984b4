"""Export check: an exported model, loaded without this package, must give the outputs of the trained one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...core.environment import free_memory
from ...core.errors import ExportError
from ...core.files import read_json, read_tensors
from ...core.tensors import Tensors, count
from ...core.text import printable
from ...data.examples import Example
from ...data.tokens import TokenizedExample
from ...models.forward import classification_logits
from ...models.load import Base
from ..protocol import State
from .loading_page import loading_code
from .model_card import with_base_folder

SWITCH = "FEDCUSTOM_EXPORT_CHECK"
"""Environment variable that switches the check off where no flag can, with the value ``off``."""

ROWS = 4
"""How many examples are compared."""

TEXTS = ("a text", "This is a second, longer text: it has 12 words and a number.")
"""What is compared where no example is at hand, as at the server of a federation of sites."""

SAME, ELSEWHERE, ROUNDED = 1e-4, 2e-3, 0.05
"""Largest difference, as a share of the largest output (or of 1, if that is less): in float32 on a processor,
in float32 on another device than the check's, and in bfloat16: both models compute their products in it, but
frozen weights and what flows between layers are rounded in training, and not in the exported model.
"""

SECONDS = 1800
"""How long loading and comparing may take."""

OVERHEAD = 600 * 2**20
"""Bytes that a process takes with torch, transformers and peft in it, beside the model."""

UNCHECKED = "; --no-check exports without comparing"

ALONE = "import sys\nsys.modules['fedcustom'] = None\nsys.path.insert(0, '')\n"
"""What stands before it: no import of this package, modules from the exported folder."""

PROBE = """
import json
import torch
from safetensors.torch import save_file
rows = json.load(open({rows!r}, encoding="utf-8"))
outputs = {{}}
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled={autocast}):
    for number, row in enumerate(rows):
        said = model(**{{name: torch.tensor([ids]) for name, ids in row["inputs"].items()}})
        values = said.logits if "logits" in said else said.last_hidden_state
        outputs[str(number)] = (values[0, -1] if values.dim() == 3 else values[0]).float().contiguous()
save_file(outputs, {outputs!r})
tokens = [list(map(int, tokenizer(row["text"])["input_ids"])) for row in rows]
json.dump(tokens, open({tokens!r}, "w", encoding="utf-8"))
"""
"""What follows the exported page's own code: the outputs of each row alone, and the ids of its text."""


@dataclass(frozen=True)
class ReferenceRow:
    """One example and what the trained model says of it: logits of (labels,) or, at the last token, of
    (vocabulary,), or that token's last state, (width,). ``inputs`` are the token ids by argument; ``tokens``
    those that the tokenizer gives for ``text``, uncut.
    """

    text: str
    inputs: dict[str, list[int]]
    tokens: list[int]
    output: Tensor


@dataclass(frozen=True)
class Reference:
    """What an exported model is compared with. ``size`` is that of its weights in float32, in bytes;
    ``autocast``: its outputs are those of products in bfloat16.
    """

    rows: tuple[ReferenceRow, ...]
    tolerance: float
    base: str
    size: int
    autocast: bool = False


@runtime_checkable
class ComparesExport(Protocol):
    """A method whose exported model can be compared with the trained one."""

    def reference(self, state: State, examples: Sequence[Example]) -> Reference | None:
        """What :func:`check_export` compares with; None where the export holds no model of its own."""


def wanted(flag: bool) -> bool:
    """Whether to check: as a command's flag says, unless the environment switches it off."""
    return flag and os.environ.get(SWITCH, "").lower() not in ("off", "0", "false", "no")


def some(examples: Sequence[Example]) -> list[Example]:
    """A few examples to compare; texts of our own where there are none."""
    return list(examples[:ROWS]) or [Example(text, label=0) for text in TEXTS]


@torch.inference_mode()
def reference(
    model: Any, base: Base, examples: Sequence[Example], tokens: Sequence[TokenizedExample]
) -> Reference:
    """The outputs of the model in memory, one row at a time. ``model`` is the customised form of ``base``;
    ``tokens`` are those of the examples.
    """
    model.eval()
    rows = []
    for example, row in zip(examples, tokens, strict=True):
        inputs = _inputs(base, row)
        batch = {name: torch.tensor([ids], device=base.device) for name, ids in inputs.items()}
        with base.autocast():
            if base.task.kind == "classification":
                output = classification_logits(model, batch)[0]
            else:
                said = model(**batch)
                output = (said.logits if "logits" in said else said.last_hidden_state)[0, -1]
        uncut = [int(token) for token in base.tokenizer(example.text)["input_ids"]]
        rows.append(ReferenceRow(example.text, inputs, uncut, output.float().cpu()))
    size = 4 * count(model.state_dict().values())
    same = SAME if base.device.type == "cpu" else ELSEWHERE
    exact = base.precision == "float32"
    return Reference(tuple(rows), same if exact else ROUNDED, base.name, size, autocast=not exact)


def check_export(folder: Path, expected: Reference) -> str:
    """Load an exported folder by the code of its own page, in a fresh process without this package and
    without a network, and compare. Returns why nothing was compared; empty if all is well.

    Raises:
        ExportError: the folder does not load, or gives other outputs or tokens.
    """
    needed, free = expected.size * 3 // 2 + OVERHEAD, free_memory(torch.device("cpu"))
    if free < needed:
        return (
            f"the exported model was not compared with the trained one: that takes {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB of memory are free"
        )
    load = loading_code((folder / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        files = {name: str(Path(place) / name) for name in ("rows", "outputs", "tokens")}
        rows = [{"inputs": row.inputs, "text": row.text} for row in expected.rows]
        Path(files["rows"]).write_text(json.dumps(rows), encoding="utf-8")
        probe = PROBE.format(**files, autocast=expected.autocast)
        _run(ALONE + with_base_folder(load, expected.base) + probe, folder, Path(place))
        outputs, tokens = read_tensors(Path(files["outputs"])), read_json(Path(files["tokens"]))
    _compare(expected, outputs, tokens)
    return ""


def _inputs(base: Base, row: TokenizedExample) -> dict[str, list[int]]:
    """The arguments of a forward pass over one example, without padding."""
    ids = row.source.tolist()
    if base.task.kind == "generation" and not base.sequence_to_sequence:
        ids = [*ids, *row.target.tolist()]
    inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if base.sequence_to_sequence:
        inputs["labels"] = row.target.tolist()
    return inputs


def _run(code: str, folder: Path, place: Path) -> None:
    """Run code in an exported folder; ``place`` is for files."""
    script = place / "check.py"
    script.write_text(code, encoding="utf-8")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place),  # copies of modeling code that transformers makes
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(script)], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"the exported model could not be compared within {SECONDS // 60} minutes{UNCHECKED}"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = printable(lines[-1], lines=False, longest=300) if lines else f"exit code {done.returncode}"
        raise ExportError(
            f"the export is refused: it does not load with transformers and peft alone: {reason}{UNCHECKED}"
        )


def _compare(expected: Reference, outputs: Tensors, tokens: list[list[int]]) -> None:
    for number, row in enumerate(expected.rows):
        found = outputs[str(number)]
        place = f"row {number + 1} ('{printable(row.text, lines=False, longest=40)}')"
        if found.shape != row.output.shape:
            raise ExportError(
                f"the export is refused: with transformers and peft alone {place} has {len(found)} outputs; "
                f"the trained model gives {len(row.output)}{UNCHECKED}"
            )
        difference = float((found - row.output).abs().max())
        allowed = expected.tolerance * max(1.0, float(row.output.abs().max()))
        if not difference <= allowed:
            raise ExportError(
                f"the export is refused: with transformers and peft alone {place} gives other outputs than "
                f"the trained model: they differ by {difference:.2g}, {allowed:.2g} is allowed{UNCHECKED}"
            )
        if tokens[number] != row.tokens:
            raise ExportError(
                f"the export is refused: the exported tokenizer reads {place} as other tokens than in "
                f"training{UNCHECKED}"
            )
