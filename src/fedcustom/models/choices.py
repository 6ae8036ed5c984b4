"""Multiple choice by likelihood: which of an example's options a model finds likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..data.examples import Example
from .inference import NO_CHOICE, Predictions


def with_choices(
    predictions: Predictions, examples: Sequence[Example], predict: Callable[[list[Example]], Predictions]
) -> Predictions:
    """The predictions with the option that the model finds likeliest for each example that has some.

    Each option stands in for the target, as the model would learn to write it, end token included. Its
    likelihood is normalised by its length: the mean log-probability of its tokens. Of equal ones the first is
    taken.

    Args:
        examples: those of the predictions, in their order.
        predict: scores (summed loss in nats, target tokens) of examples that are given it.
    """
    asked = [number for number, example in enumerate(examples) if example.options]
    if not asked:
        return predictions
    each = [replace(examples[i], target=option) for i in asked for option in examples[i].options]
    losses, tokens = predict(each).scores.T
    chosen, start = np.full(len(examples), NO_CHOICE), 0
    for number in asked:
        end = start + len(examples[number].options)
        chosen[number] = int((losses[start:end] / np.maximum(tokens[start:end], 1)).argmin())
        start = end
    return replace(predictions, chosen=chosen)
