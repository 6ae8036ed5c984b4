"""Prefix memory: learnt slots of keys and values beside attention and beside the feed-forward networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ModelError
from ...models.load import Base
from ...models.quantised_layers import device_of
from ..tuning.feed_forward import FeedForward, find_feed_forward
from ..tuning.peft_support import upper
from ..tuning.technique import TrainableModel
from ..tuning.whole_model import partly_trained
from ..tuning.widening import Widening
from .attention_places import Place, attention_places
from .attention_slots import add_slots
from .memory_aggregation import memory_hooks
from .memory_export import export_with_code, require_library_code
from .settings import PrefixSettings
from .text_keys import text_keys


@dataclass(frozen=True)
class Sizes:
    """How many slots there are beside each attention block, and beside each feed-forward network."""

    attention: int
    feed_forward: int


def attach_memory(base: Base, settings: PrefixSettings, seed: int) -> TrainableModel:
    """Put slots beside the attention blocks and feed-forward networks of ``base.model``, in place.

    What travels: ``keys`` of (heads, slots, d) and ``values`` of (heads, slots, e) of each attention block,
    with ``query_shifts`` also ``shifts`` of (heads, slots, d); the rows and columns of the feed-forward slots
    (as in :class:`~..adapter.method.Adapter`), and the head.
    With ``keys = "frozen"`` keys and rows are those of the seed and do not travel.

    Raises:
        ModelError: the model has no attention blocks, or no feed-forward networks, that slots fit beside.
    """
    model = base.model
    found = find_feed_forward(base)
    shifts = shifts_queries(settings, base)
    places: list[Place] = []
    missed: list[str] = []
    if settings.slots != 0 or settings.feed_forward_slots is None or settings.linear:
        places, missed = attention_places(base)
    if first := settings.lowest:
        places, missed, found = _upper_blocks(base, places, missed, found, first)
    sizes = slots_for(settings, places, found, base)
    chosen: set[str] = set()
    memory: dict[str, Any] | None = None
    trained = settings.keys == "trained"
    starts: dict[str, Tensor] = {}
    if settings.init == "text" and sizes.attention:
        starts = text_keys(base, places, settings.init_text, sizes.attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if sizes.attention or settings.linear:
            require_library_code(base)
            if found is not None and (both := {place.query for place in places} & {*found.inputs}):
                raise ModelError(
                    f"method.kind = 'memory' does not fit {base.name}: {min(both)} gives queries and hidden "
                    "units alike; use method lora"
                )
            memory = {
                "slots": sizes.attention,
                "activation": activation_of(model.config),
                "linear": settings.linear,
                "shifts": shifts,
                "places": [place.entry() for place in places],
            }
            for name, slots in add_slots(model, memory).items():
                if starts:
                    slots.keys.data.copy_(starts[name.removesuffix(".slots")])
                slots.to(device_of(model.get_submodule(name.removesuffix(".slots"))))
                parts = {key for key, _ in slots.named_parameters() if trained or key != "keys"}
                chosen |= {f"{name}.{part}" for part in parts}
    widening = None
    if sizes.feed_forward and found is not None:
        widening = Widening(model, found, sizes.feed_forward, seed)
        chosen |= widening.names(inputs=trained)
    trainable = partly_trained(base, seed, chosen)
    if missed and memory is not None:
        one = f"{missed[0]}{', ...' if missed[1:] else ''}"
        trainable.remarks.append(
            f"{base.name}: slots stand beside {len(places)} of its {len(places) + len(missed)} attention "
            f"blocks; the matrices of the others ({one}) cannot be reached"
        )
    export_with_code(trainable, base, memory, widening)
    wider, activation = found if widening else None, activation_of(model.config)
    trainable.hooks = memory_hooks(base, settings.merging, trainable, memory, wider, activation)
    return trainable


def _upper_blocks(
    base: Base, places: Sequence[Place], missed: Sequence[str], found: FeedForward | None, first: int
) -> tuple[list[Place], list[str], FeedForward | None]:
    """The attention blocks, those that slots cannot stand beside, and the feed-forward networks, of layers
    from ``first`` on.
    """
    matrices = (*found.inputs, *found.outputs) if found is not None else ()
    kept = upper(base, [*(place.query for place in places), *missed, *matrices], first)
    networks = found.of(kept) if found is not None else None
    if networks is not None and not networks.inputs:
        networks = None
    return [p for p in places if p.query in kept], [name for name in missed if name in kept], networks


def shifts_queries(settings: PrefixSettings, base: Base) -> bool:
    """Whether slots shift queries: as the recipe says, or else in decoders (docs/prefix.md: measured)."""
    return base.architecture != "encoder" if settings.query_shifts is None else settings.query_shifts


def slots_for(
    settings: PrefixSettings, places: Sequence[Place], found: FeedForward | None, base: Base
) -> Sizes:
    """The recipe's numbers of slots. Unset, half of the numbers that key-value pairs of ``length`` would have
    in the layers that are trained go beside attention, and the rest beside the feed-forward networks. There
    is at least one slot.

    Raises:
        ModelError: slots beside feed-forward networks were asked for, and there are none that take them; or
            no slots are left.
    """
    if settings.feed_forward_slots and found is None:
        raise ModelError(
            f"method.feed_forward_slots = {settings.feed_forward_slots} does not fit {base.name}: its "
            f"{base.model.config.model_type} code has no feed-forward networks of plain matrices whose width "
            "is a setting; allowed: 0"
        )
    if settings.slots == 0 and found is None and not settings.linear:
        raise ModelError(
            f"method.slots = 0 does not fit {base.name}: its {base.model.config.model_type} code has no "
            "feed-forward networks of plain matrices whose width is a setting, so that no slots are left; "
            "allowed: 1 or more"
        )
    budget = settings.length * sum(place.cached for place in places)
    beside_attention = sum(place.slot_size(shifts=shifts_queries(settings, base)) for place in places)
    if settings.linear:
        budget -= sum(place.heads * place.size * place.value_size for place in places)
    beside_others = 0 if found is None else unit_size(base.model, found)
    attention, feed_forward = settings.slots, settings.feed_forward_slots
    if found is None:
        feed_forward = 0
    if attention is None:
        left = budget - (feed_forward or 0) * beside_others
        attention = max((left // 2 if feed_forward is None else left) // beside_attention, 1)
        if feed_forward is None and budget - attention * beside_attention < beside_others:
            attention, feed_forward = max(left // beside_attention, 1), 0
    if feed_forward is None:
        feed_forward = max((budget - attention * beside_attention) // beside_others, 1)
    return Sizes(attention, feed_forward)


def unit_size(model: nn.Module, found: FeedForward) -> int:
    """How many numbers one hidden unit more in every network has."""
    total = 0
    for name in (*found.inputs, *found.outputs):
        module: Any = model.get_submodule(name)
        own = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        entering = name in found.inputs
        total += own[1] + (module.bias is not None) if entering else own[0]
    return total


def activation_of(config: Any) -> str:
    """The activation of the model's feed-forward networks, by its name in ``transformers``; else GELU."""
    from transformers.activations import ACT2FN

    for key in ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn"):
        name = getattr(config, key, None)
        if isinstance(name, str) and name in ACT2FN:
            return name
    return "gelu"
