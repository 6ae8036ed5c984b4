"""Folding of a prefix memory into feed-forward slots alone: a plain model, distilled on public texts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import DataError, ModelError
from ...core.files import write_text
from ...models.load import Base
from ..adapter.method import Adapter
from ..adapter.settings import AdapterSettings
from ..tuning.feed_forward import FeedForward, find_feed_forward
from ..tuning.peft_support import upper
from ..tuning.technique import TrainableModel
from .memory import unit_size

STEPS, BATCH, RATE = 400, 16, 3e-3
"""Steps of the distillation, texts in each, and its learning rate at first."""

TOKENS = 128
"""Most tokens of a text."""

EVERY = 10.0
"""Seconds after which the distillation says again how far it is."""


@dataclass(frozen=True)
class Folded:
    """A model without attention slots. ``before`` and ``after`` are the relative distances |y - y'| / |y| of
    its outputs from those of the full memory on ``held_out`` texts: with the attention slots left out, and
    after the distillation on ``trained`` texts. ``effect`` is that of a model without any slots.
    """

    trainable: TrainableModel
    slots: int
    own: int
    trained: int
    held_out: int
    effect: float
    before: float
    after: float

    @property
    def cost(self) -> str:
        """What folding costs, in one line."""
        return (
            f"{self.slots} feed-forward slots in place of {self.own} and the attention slots; relative error "
            f"of the outputs on {self.held_out} held-out texts: {self.before:.4f} with the attention slots "
            f"left out, {self.after:.4f} after distillation on {self.trained} texts (without any slots: "
            f"{self.effect:.4f})"
        )


def read_texts(path: Path) -> list[str]:
    """The lines of a file of public texts.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or has fewer than two texts.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {path}: cannot be read as UTF-8 text: {error}") from None
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 2:
        raise DataError(f"--text {path}: holds {len(texts)} texts; allowed: 2 or more, one a line")
    return texts


def fold(
    base: Base,
    teacher: TrainableModel,
    texts: Sequence[str],
    slots: int | None,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
    first_layer: int = 0,
) -> Folded:
    """Distil a memory, ``teacher``, into feed-forward slots of ``base``, a second copy of its base model, in
    place; ``slots`` unset: as many as have the memory's numbers.

    All of the units are trained (Adam): they start as the memory's own, and the others as in
    :class:`~..adapter.method.Adapter`. What is fitted are the last hidden states, or the logits where the
    model gives no others, in the mean square over tokens. Every tenth text is held out. ``note`` is told
    every ten seconds how far the distillation is. Layers below ``first_layer`` are left as they are.

    Raises:
        ModelError: the model has no feed-forward networks that can be widened, or ``slots`` are fewer than
            the memory's own.
    """
    found = find_feed_forward(base)
    if found is None:
        raise ModelError(
            f"--as feed-forward does not fit {base.name}: its {base.model.config.model_type} code has no "
            "feed-forward networks of plain matrices whose width is a setting; use --as model"
        )
    if first_layer:
        found = found.of(upper(base, (*found.inputs, *found.outputs), first_layer))
    memory = dict(teacher.model.named_parameters())
    own = next((len(memory[n]) for name in found.inputs if (n := f"{name}.adapter.weight") in memory), 0)
    width = slots or own + _as_many(memory, base.model, found)
    if width < own:
        raise ModelError(f"--slots {width}: the memory has {own} feed-forward slots; allowed: {own} or more")
    student = Adapter(AdapterSettings(width=width, first_layer=first_layer)).attach(base, seed)
    with torch.no_grad():
        for name in student.head:
            student.parameters[name].copy_(memory[name])
        extra = {n: p for n, p in student.parameters.items() if n not in student.head}
        batches, held = _batches(base, texts)
        effect = _error(teacher.model, student.model, held, base)
        for name, parameter in extra.items():
            if own:
                _beginning(parameter, memory[name]).copy_(memory[name])
        before = _error(teacher.model, student.model, held, base)
    note(f"distilling the slots on {len(texts)} texts in {STEPS} steps, which takes some minutes")
    _distil(teacher.model, student.model, list(extra.values()), batches, base, note)
    after = _error(teacher.model, student.model, held, base)
    held_out = len(texts[::10])
    return Folded(student, width, own, len(texts) - held_out, held_out, effect, before, after)


def write_folded(folded: Folded, base: Base, folder: Path) -> None:
    """Write the plain model with its tokenizer, and what folding cost into its page."""
    folded.trainable.save(folder)
    base.tokenizer.save_pretrained(folder)
    page = folder / "README.md"
    note = f"\n## Folded into feed-forward slots\n\nThis model imitates a prefix memory: {folded.cost}.\n"
    write_text(page, page.read_text(encoding="utf-8") + note)


def _as_many(memory: Mapping[str, nn.Parameter], model: nn.Module, found: FeedForward) -> int:
    """How many units in every network have about as many numbers as the attention slots."""
    numbers = sum(p.numel() for name, p in memory.items() if ".slots." in name)
    return max(1, round(numbers / unit_size(model, found)))


def _beginning(parameter: Tensor, part: Tensor) -> Tensor:
    """The rows or columns of a parameter that are the memory's own units."""
    return parameter[tuple(slice(size) for size in part.shape)]


def _batches(base: Base, texts: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Batches to train on, and held-out ones; texts of like lengths lie together."""
    every = [base.tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    result = []
    for rows in (
        [ids for number, ids in enumerate(every) if number % 10],
        [ids for number, ids in enumerate(every) if number % 10 == 0],
    ):
        ordered = sorted(rows, key=len)
        groups = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
        if base.padding == "none":
            lengths = sorted({len(ids) for ids in ordered})
            groups = [[ids for ids in ordered if len(ids) == length] for length in lengths]
        result.append([_collated(base, group) for group in groups])
    return result[0], result[1]


def _collated(base: Base, rows: Sequence[list[int]]) -> dict[str, Tensor]:
    padded = base.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt", padding_side="right")
    return {name: padded[name].to(base.device) for name in ("input_ids", "attention_mask")}


def _outputs(model: Any, batch: Mapping[str, Tensor], base: Base) -> Tensor:
    """What is fitted: (tokens, width) of the tokens that are no padding. The decoder of two stacks reads the
    text that its encoder reads.
    """
    body = getattr(model, model.base_model_prefix, model)
    other = {}
    if base.architecture == "encoder-decoder":
        other = {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    with base.autocast():
        found = body(**batch, **other)
    states: Tensor = found["last_hidden_state" if "last_hidden_state" in found else "logits"]
    return states.float()[batch["attention_mask"].bool()]


@torch.no_grad()
def _error(teacher: Any, student: Any, batches: Sequence[Any], base: Base) -> float:
    """|y - y'| / |y| over all tokens."""
    gap = size = 0.0
    for batch in batches:
        wanted = _outputs(teacher, batch, base)
        gap += float((_outputs(student, batch, base) - wanted).square().sum())
        size += float(wanted.square().sum())
    return math.sqrt(gap / size)


def _distil(
    teacher: Any,
    student: Any,
    parameters: list[nn.Parameter],
    batches: Sequence[Any],
    base: Base,
    note: Callable[[str], None],
) -> None:
    teacher.eval()
    student.eval()
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    said = time.monotonic()
    with torch.enable_grad():
        for step, batch in enumerate(_in_order(batches), 1):
            with torch.no_grad():
                wanted = _outputs(teacher, batch, base)
            loss = (_outputs(student, batch, base) - wanted).square().mean() / wanted.square().mean()
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            if time.monotonic() - said >= EVERY:
                said = time.monotonic()
                note(f"distilling: step {step} of {STEPS}, relative error {math.sqrt(loss.item()):.3f}")


def _in_order(batches: Sequence[Any]) -> Iterator[Any]:
    """As many batches as there are steps; in each pass in another order, always the same."""
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for _ in range(STEPS):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[order.pop()]
