"""Last layer of a first-token classifier, computed for that token alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .frozen_layers import transformer_layers

FAMILIES = (
    "bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip
"""Configurations' names of the encoders whose layers are known to be of this form."""

AFTER_ATTENTION = ("attention.output", "attention.LayerNorm", "sa_layer_norm", "mlp_norm")
"""Where a layer goes on once its tokens have looked at each other: in the families of BERT, MPNet, DistilBERT
and ModernBERT.
"""


class _Pass(threading.local):
    """Whether the thread is in a pass of which only logits are wanted; the tokens that are classified,
    (rows, tokens), or the places of the states that logits are read off, (rows,), where they are known.
    """

    classifies = False
    ids: Tensor | None = None
    places: Tensor | None = None


_PASS = _Pass()


@contextmanager
def classifying(ids: Tensor | None = None, places: Tensor | None = None) -> Iterator[None]:
    """Meanwhile, of passes in this thread only the classifier's logits are wanted: those of the tokens
    ``ids``, (rows, tokens), read off the states at ``places``, (rows,), or where the model's code reads them.
    """
    before = dict(vars(_PASS))
    _PASS.classifies, _PASS.ids, _PASS.places = True, ids, places
    try:
        yield
    finally:
        vars(_PASS).clear()
        vars(_PASS).update(before)


@contextmanager
def reading(places: Tensor) -> Iterator[None]:
    """Meanwhile, a pass of which only logits are wanted has them read off the states at these places."""
    before, _PASS.places = _PASS.places, places
    try:
        yield
    finally:
        _PASS.places = before


def places_read(pad: int, states: Tensor) -> Tensor | None:
    """The places of ``states``, (rows, tokens, width), that a decoder's logits are read off, (rows,): the
    last token that is not ``pad``, unless others are given. None where it is not known, or where other states
    are wanted too.
    """
    if not _PASS.classifies:
        return None
    if _PASS.places is not None:
        return _PASS.places
    ids = _PASS.ids
    if ids is None or ids.shape != states.shape[:2]:
        return None
    numbers = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    return ((ids != pad) * numbers).argmax(dim=1)


def carry_classifying() -> Callable[[], AbstractContextManager[None]]:
    """The context in which a pass of this thread can be repeated (:mod:`.checkpointing`)."""
    return partial(classifying, _PASS.ids, _PASS.places) if _PASS.classifies else nullcontext


@torch.no_grad()
def first_token_only(model: Any) -> bool:
    """While :func:`classifying`, let a classifier compute what follows attention in its last layer for the
    first token alone, where nothing else reaches its logits; whether it can.

    That saves an eighth of the products of six layers whose feed-forward parts are four times as wide. A pass
    with and one without must give the same logits; otherwise the model is left as it is.
    """
    found = transformer_layers(model)
    if found is None or model.config.model_type not in FAMILIES:
        return False
    last = dict(found[1][-1].named_modules())
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(3, 13, device=model.device).view(2, 5) % vocabulary
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=model.device)
    whole = model(input_ids=ids, attention_mask=mask).logits
    for name in AFTER_ATTENTION:
        if name not in last:
            continue
        hook = last[name].register_forward_pre_hook(partial(_first, model.config))
        try:
            with classifying():
                logits = model(input_ids=ids, attention_mask=mask).logits
            if torch.allclose(logits, whole, atol=1e-5):
                return True
        except RuntimeError:
            pass
        hook.remove()
    return False


def _first(config: Any, module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """(rows, tokens, width) to (rows, 1, width), contiguous: else torch copies a matrix that follows for each
    row. Virtual tokens in front of a text are passed over where the classifier does so.
    """
    at = getattr(config, "skip", 0) if getattr(config, "pooling", None) == "first" else 0
    return tuple(states[:, at : at + 1].contiguous() for states in arguments) if _PASS.classifies else None
