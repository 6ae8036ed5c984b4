"""A trial pass: whether a method fits a model is seen before any client trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...core.errors import FedcustomError
from ...data.examples import Example
from ...data.tokens import Rejected, TokenizedExample
from ...evaluation.settings import EvaluationSettings
from ...models.inference import generate
from ...models.load import Base
from ...models.padding import TRIAL_TEXTS, Padding, find_padding, trial, trial_ids
from .objective import Objective
from .technique import TrainableModel


def trial_rows(objective: Objective, base: Base) -> list[TokenizedExample]:
    """Three rows of unlike lengths, of no client's text."""
    short, long = TRIAL_TEXTS
    middle = long[: len(long) // 2]
    other = min(1, len(base.task.labels) - 1)
    special = set(base.tokenizer.all_special_ids)
    try:
        rows = objective.tokens(
            [
                Example(short, 0, long, rejected=middle),
                Example(long, other, short, rejected=long),
                Example(middle, 0, middle, rejected=short),
            ]
        )
        if not any(special.issuperset(row.source.tolist()) for row in rows):
            return rows
    except FedcustomError:
        pass  # a tokenizer that has no tokens for these words may have some for the clients'
    few, many = trial_ids(base)
    rows = [
        TokenizedExample.of(few, many[:4], 0),
        TokenizedExample.of(many, few, other),
        TokenizedExample.of(many[:5], many[:2], 0),
    ]
    if base.task.preference:  # in which each answer is some other row's rejected one, without a reference
        others = [rows[1], rows[2], rows[0]]
        return [
            replace(r, rejected=Rejected(o.target, (0.0, 0.0))) for r, o in zip(rows, others, strict=True)
        ]
    return rows


def trial_pass(
    name: str, trainable: TrainableModel, objective: Objective, base: Base, evaluation: EvaluationSettings
) -> Padding:
    """A training step's passes over three short rows, and two tokens of a generated text; how rows must share
    a batch (:mod:`fedcustom.models.padding`).

    Raises:
        ModelError: the model's code fails with the method attached, or what it makes of a text depends on
            the other texts of its batch.
    """
    model, rows = trainable.model, trial_rows(objective, base)
    kind = base.model.config.model_type
    model.eval()

    def refusal(reason: str) -> str:
        return (
            f"method {name} does not fit {base.name}: in a trial pass its {kind} code fails "
            f"({reason[:200]}); use method {'full' if name == 'lora' else 'lora'}"
        )

    with trial(model, refusal), torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss = objective.loss(model, objective.collate(rows))
        torch.autograd.grad(loss, list(trainable.parameters.values()), allow_unused=True)
        if base.task.kind == "generation":
            short = evaluation.model_copy(update={"max_new_tokens": 2})
            generate(model, base, [rows[0].source], short)
    # In bfloat16 rounding differs with the shape of a batch; loading has looked at the model in float32.
    if not objective.separable or base.padding == "none" or base.precision != "float32":
        return base.padding

    def losses(chosen: Sequence[int]) -> torch.Tensor:
        some = [rows[i] for i in chosen]
        units = torch.tensor([max(1, objective.units(row)) for row in some], device=base.device)
        return objective.row_losses(model, objective.collate(some)).float() / units

    return find_padding(model, losses, f"{base.name} with method {name}")
