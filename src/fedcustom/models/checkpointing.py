"""Gradient checkpointing: activations of layers that are computed again in the backward pass (Chen et al.
2016).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Carry = Callable[[], Callable[[], AbstractContextManager[None]]]
"""Called in a forward pass: notes what the pass depends on besides its inputs, and gives the context in which
it can be repeated, in whichever thread the backward pass runs.
"""


class _Pass(threading.local):
    """Whether the thread is in a pass that keeps all activations."""

    keeps_all = False


_PASS = _Pass()


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose activations can be recomputed: those that ``transformers`` marks as such."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside |= set(module.modules())
    return found


def kept_share(layers: int) -> float:
    """Which part of a pass's activations is kept at a time: those of one layer, and the inputs of all.

    A layer keeps 34 bytes for each token and unit of its width besides attention, of which its input is 2
    (Korthikanti et al. 2022, eq. 1); a sixteenth is taken.
    """
    return min(1.0, 1 / max(layers, 1) + 1 / 16)


@contextmanager
def keeping_all() -> Iterator[None]:
    """Meanwhile, passes in this thread keep all activations, so that they can be counted."""
    before, _PASS.keeps_all = _PASS.keeps_all, True
    try:
        yield
    finally:
        _PASS.keeps_all = before


@contextmanager
def checkpointing(
    model: nn.Module, carried: Sequence[Carry] = (), *, dropout: bool = False
) -> Iterator[None]:
    """Meanwhile, forward passes with gradients keep the inputs of layers alone.

    The flag of ``transformers`` is not used: it acts on models in training mode alone, and takes key-value
    pairs of a prefix away from layers (``past_key_values``). Here a layer is repeated with the cache as it
    found it. Models keep no cache of their own meanwhile.

    Args:
        model: The model, as it is trained; its layers as :func:`checkpointed_layers` finds them.
        carried: What passes depend on besides their inputs.
        dropout: Whether layers draw random numbers, which are then drawn again.
    """
    layers = checkpointed_layers(model)
    configurations = {id(c): c for module in model.modules() for c in _configurations(module)}
    caching = [(c, c.use_cache) for c in configurations.values()]
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for configuration, _ in caching:
            configuration.use_cache = False
        for layer in layers:
            layer.__dict__["forward"] = partial(_forward, layer.forward, carried, dropout)
        yield
    finally:
        for layer, forward in before:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.__dict__["forward"] = forward
        for configuration, used in caching:
            configuration.use_cache = used


def _configurations(module: nn.Module) -> list[Any]:
    configuration = getattr(module, "config", None)
    return [configuration] if getattr(configuration, "use_cache", None) else []


def _forward(
    forward: Callable[..., Any], carried: Sequence[Carry], dropout: bool, *arguments: Any, **named: Any
) -> Any:
    """A layer's forward pass, and what repeats it."""
    if _PASS.keeps_all or not torch.is_grad_enabled():
        return forward(*arguments, **named)
    contexts = [carry() for carry in carried]
    restore = [_as_found(value) for value in (*arguments, *named.values()) if _is_cache(value)]

    def again(*given: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            for put_back in restore:
                put_back()
            return forward(*given, **named)

    return checkpoint(again, *arguments, use_reentrant=False, preserve_rng_state=dropout)


def _is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def _as_found(cache: Any) -> Callable[[], None]:
    """What gives a cache the tensors that it holds now. Layers put others in their place; they do not change
    them.
    """
    two = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    parts: list[Any] = [part for part in two if part is not None] or [cache]
    held = [(part, list(part.layers), [dict(vars(layer)) for layer in part.layers]) for part in parts]
    updated = dict(getattr(cache, "is_updated", {}))

    def put_back() -> None:
        for part, layers, states in held:
            part.layers[:] = layers
            for layer, state in zip(layers, states, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
        if updated:
            cache.is_updated = dict(updated)

    return put_back
