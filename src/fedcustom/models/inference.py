"""Inference: class logits, target losses and generated texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.examples import Example
from ..data.tokens import Batch, TokenizedExample, by_length, collate
from ..evaluation.metrics import (
    Metrics,
    classification_metrics,
    preference_metrics,
    retrieval_metrics,
    text_metrics,
    token_loss,
)
from ..evaluation.settings import CHOICE_METRIC, EvaluationSettings
from .forward import classification_logits, target_losses
from .load import Base

Scores = np.ndarray[Any, np.dtype[np.float64]]

NO_CHOICE = -1
"""In place of an option's number, where an example has no options."""


@dataclass(frozen=True)
class Predictions:
    """What a customised model says of some examples, in their order.

    ``scores`` are the rows from which metrics are computed: logits of (examples, labels) for a classifier,
    and (summed loss in nats, target tokens) of (examples, 2) for a generator; of preference pairs (loss,
    reward margin, log-likelihood of the chosen answer less that of the other) of (pairs, 3). ``texts`` are
    generated texts, where asked for: of all examples, or of those at the positions ``written``. ``chosen``
    (examples,) has the numbers of the likeliest options, where examples have some (:mod:`.choices`).
    """

    scores: Scores
    texts: list[str] | None = None
    written: tuple[int, ...] | None = None
    chosen: np.ndarray[Any, np.dtype[np.int64]] | None = None

    def select(self, positions: Sequence[int]) -> Predictions:
        """The predictions at some positions; their scores alone where texts are there for a part only."""
        texts = None if self.texts is None or self.written else [self.texts[i] for i in positions]
        chosen = None if self.chosen is None else self.chosen[list(positions)]
        return Predictions(self.scores[list(positions)], texts, chosen=chosen)

    def with_texts(self, examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The examples for which a text was written, each with that text."""
        places = range(len(examples)) if self.written is None else self.written
        return list(zip([examples[i] for i in places], self.texts, strict=True)) if self.texts else []

    def with_choices(self, examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The examples that have options, each with the option that is the likeliest."""
        if self.chosen is None:
            return []
        pairs = zip(examples, self.chosen.tolist(), strict=True)
        return [(example, example.options[number].strip()) for example, number in pairs if example.options]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is."""
    if device.type == "cpu":
        return batch
    if device.type == "cuda":  # only from pinned memory does a copy not hold up the host
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.inference_mode()
def predict(
    model: Any,
    base: Base,
    examples: Sequence[TokenizedExample],
    settings: EvaluationSettings,
    *,
    texts: bool = False,
) -> Predictions:
    """Scores of all examples and, if asked for, texts. ``model`` is the customised form of ``base``.

    Batches hold examples of similar length.
    """
    model.eval()
    classes = base.task.kind == "classification"
    scores = np.zeros((len(examples), len(base.task.labels) if classes else 2))
    for positions in by_length(examples, settings.batch_size, equal=base.padding == "none"):
        batch = collate(
            [examples[i] for i in positions],
            base.tokenizer.pad_token_id,
            base.task,
            sequence_to_sequence=base.sequence_to_sequence,
        )
        batch = to_device(batch, base.device)
        with base.autocast():
            if classes:
                scores[positions] = classification_logits(model, batch).double().cpu().numpy()
            else:
                losses, counts = target_losses(
                    model, batch, sequence_to_sequence=base.sequence_to_sequence, output=base.output
                )
                scores[positions, 0] = losses.double().cpu().numpy()
                scores[positions, 1] = counts.cpu().numpy()
    if not texts or classes:
        return Predictions(scores)
    return Predictions(scores, generate(model, base, [example.source for example in examples], settings))


@torch.inference_mode()
def generate(
    model: Any,
    base: Base,
    sources: Sequence[np.ndarray[Any, np.dtype[np.int32]]],
    settings: EvaluationSettings,
) -> list[str]:
    """The texts that the model writes after prompts, by greedy or beam search, without surrounding space.

    Prompts of one length share a batch: behind padding, models with absolute positions and PEFT's soft
    prompts would place a prompt elsewhere than when it stands alone.
    """
    tokenizer = base.tokenizer
    written = [""] * len(sources)
    for positions in _of_one_length(sources, settings.batch_size):
        ids = torch.from_numpy(np.stack([sources[i] for i in positions]).astype(np.int64))
        batch = to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, base.device)
        output = generated(
            model,
            base,
            batch,
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.beams,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        if base.chat is not None:  # whose end token need not be a special one
            texts = [decoded(base, row.tolist()) for row in output]
        for position, text in zip(positions, texts, strict=True):
            written[position] = text.strip()
    return written


def generated(model: Any, base: Base, batch: Batch, **options: Any) -> torch.Tensor:
    """The tokens that the model writes after prompts of one length, (prompts, tokens); those of an
    encoder-decoder begin with the token that all of its texts begin with. ``options`` are those of
    ``generate`` of ``transformers``.
    """
    with base.autocast(), warnings.catch_warnings():
        # Without padding, none are needed.
        warnings.filterwarnings("ignore", "Position ids are not supported")
        output: torch.Tensor = model.generate(
            **batch, pad_token_id=base.tokenizer.pad_token_id, eos_token_id=base.stops, **options
        )
    return output if base.sequence_to_sequence else output[:, batch["input_ids"].shape[1] :]


def decoded(base: Base, ids: Sequence[int]) -> str:
    """The text of an answer, up to the first token by which it ends."""
    stop = next((place for place, token in enumerate(ids) if token in base.stops), len(ids))
    return str(base.tokenizer.decode(ids[:stop], skip_special_tokens=True))


def _of_one_length(
    sources: Sequence[np.ndarray[Any, np.dtype[np.int32]]], batch_size: int
) -> Iterator[list[int]]:
    """Positions in batches of sources that are equally long."""
    groups: dict[int, list[int]] = {}
    for position, source in enumerate(sources):
        groups.setdefault(len(source), []).append(position)
    for length in sorted(groups, reverse=True):
        for start in range(0, len(groups[length]), batch_size):
            yield groups[length][start : start + batch_size]


def measure(predictions: Predictions, examples: Sequence[Example], base: Base) -> Metrics:
    """The metrics of predictions; those of texts only where texts were generated. There must be one
    example at least.
    """
    if base.task.kind == "classification":
        labels = torch.tensor([example.label for example in examples])
        return classification_metrics(torch.from_numpy(predictions.scores), labels)
    if base.task.preference:
        return preference_metrics(predictions.scores)
    if base.task.kind == "retrieval":
        return retrieval_metrics(
            predictions.scores[:, 0].astype(int).tolist(), predictions.scores[:, 1].tolist()
        )
    metrics = {"loss": token_loss(predictions.scores[:, 0].tolist(), predictions.scores[:, 1].tolist())}
    if predictions.texts is not None:
        written = predictions.with_texts(examples)
        metrics.update(text_metrics(predictions.texts, [example.references for example, _ in written]))
    if predictions.chosen is not None:
        pairs = list(zip(predictions.chosen.tolist(), examples, strict=True))
        right = [chosen == example.right_option for chosen, example in pairs if example.options]
        metrics |= {CHOICE_METRIC: float(np.mean(right))} if right else {}
    return metrics
