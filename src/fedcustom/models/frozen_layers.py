"""Cached lower layers: the outputs of frozen layers below all trained ones, computed once per example."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tokens import TokenizedExample


def transformer_layers(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The name and the layers of the one stack that a model of text has; None where it has two or none."""
    configuration = model.config
    depth = getattr(configuration, "num_hidden_layers", None)
    if getattr(configuration, "is_encoder_decoder", False) or depth is None:
        return None
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return stacks[0] if len(stacks) == 1 else None


def lowest_stack(model: Any) -> tuple[str, nn.ModuleList] | None:
    """The layers that a text goes through first: the one stack, or an encoder-decoder's encoder; None where
    they cannot be told.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return transformer_layers(model)
    stacks = _stacks_in(model, "get_encoder", ("encoder_layers", "num_layers", "num_hidden_layers"))
    return stacks[0] if len(stacks) == 1 else None


def _stacks_in(model: Any, part: str, depths: Sequence[str]) -> list[tuple[str, nn.ModuleList]]:
    """The stacks of a model's encoder or decoder, whose depth is the first of these settings."""
    body: Any = getattr(model, part, lambda: None)()
    depth = next((found for key in depths if (found := getattr(model.config, key, None)) is not None), None)
    around = next((name for name, module in model.named_modules() if module is body and body), None)
    if around is None:
        return []
    stacks: list[tuple[str, nn.ModuleList]] = []
    for inner, module in body.named_modules():
        name = f"{around}.{inner}"
        nested = any(name.startswith(f"{outer}.") for outer, _ in stacks)  # T5's layers have lists of parts
        if isinstance(module, nn.ModuleList) and len(module) == depth and not nested:
            stacks.append((name, module))
    return stacks


def _above(model: Any) -> str | None:
    """The stack of layers that follows on the lowest one: an encoder-decoder's decoder."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    depths = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers")
    stacks = _stacks_in(model, "get_decoder", depths)
    return stacks[0][0] if len(stacks) == 1 else None


def layer_of(name: str, stack: str) -> int | None:
    """The layer that a parameter or module belongs to, counted from 0; None outside the stack."""
    if not name.startswith(f"{stack}."):
        return None
    return int(name.removeprefix(f"{stack}.").partition(".")[0])


class LowerLayers:
    """The layers below the first that is trained. What goes into that one is kept for each example, without
    its padding, and the layers below are passed by when it is known for a whole batch.

    ``room`` is how many bytes may be kept where the model is, and ``spare`` how many more in main memory, for
    a model on an accelerator; examples beyond both are computed anew each time.
    """

    def __init__(self, layers: nn.ModuleList, first: int, room: int, spare: int = 0) -> None:
        self.below, self.room, self.spare = list(layers[:first]), room, spare
        self.kept: dict[int, tuple[TokenizedExample, Tensor]] = {}
        self.passed = 0
        self.bytes_per_token = 0
        self._wrapped = True
        self._batch: tuple[list[TokenizedExample], Tensor] | None = None
        self._hooks = [
            self.below[0].register_forward_hook(self._notice),
            layers[first].register_forward_pre_hook(self._enter, with_kwargs=True),
        ]

    def expect(self, rows: Sequence[TokenizedExample], mask: Tensor) -> None:
        """The model's next forward pass is of these examples, with an attention mask of (rows, tokens)."""
        self._batch = list(rows), mask.bool()
        known = all(id(row) in self.kept for row in rows)
        for layer in self.below:
            layer.__dict__.pop("forward", None)
            if known:
                layer.__dict__["forward"] = self._pass_by
        self.passed += known

    def forget(self) -> None:
        """The next forward pass is of other examples."""
        self._batch = None
        for layer in self.below:
            layer.__dict__.pop("forward", None)

    def empty(self) -> None:
        """Keep nothing of what was seen so far."""
        self.forget()
        for _, states in self.kept.values():
            self._give_back(states)
        self.kept.clear()
        self.passed = 0

    def remove(self) -> None:
        """Leave the model as it was."""
        self.empty()
        for hook in self._hooks:
            hook.remove()

    @property
    def held(self) -> int:
        """Bytes of what is kept."""
        return sum(_size(states) for _, states in self.kept.values())

    def _pass_by(self, *arguments: Any, **named: Any) -> Any:
        states = arguments[0] if arguments else named["hidden_states"]
        return (states,) if self._wrapped else states

    def _notice(self, layer: nn.Module, arguments: Any, result: Any) -> None:
        self._wrapped = isinstance(result, tuple)

    def _enter(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """At the first trained layer: keep what comes, or give what is kept."""
        if self._batch is None:
            return None
        (rows, mask), states = self._batch, arguments[0] if arguments else named["hidden_states"]
        known = "forward" in self.below[0].__dict__
        self.forget()
        if known:
            own = torch.cat([self.kept[id(row)][1].to(states.device) for row in rows])
            states = torch.zeros_like(states, dtype=own.dtype)
            states[mask] = own
        else:
            self._keep(rows, states.detach()[mask].split(mask.sum(dim=1).tolist()))
        if arguments:
            return (states, *arguments[1:]), named
        return arguments, {**named, "hidden_states": states}

    def _keep(self, rows: Sequence[TokenizedExample], states: Sequence[Tensor]) -> None:
        for row, own in zip(rows, states, strict=True):
            self.bytes_per_token = own.shape[-1] * own.element_size()
            if id(row) in self.kept:
                continue
            # The row is held, so that its id stays its own.
            if (size := _size(own)) <= self.room:
                self.kept[id(row)] = row, own.clone()
                self.room -= size
            elif own.device.type != "cpu" and size <= self.spare:
                self.kept[id(row)] = row, own.cpu()
                self.spare -= size

    def _give_back(self, states: Tensor) -> None:
        if states.device.type == "cpu" and next(self.below[0].parameters()).device.type != "cpu":
            self.spare += _size(states)
        else:
            self.room += _size(states)


def _size(states: Tensor) -> int:
    return states.numel() * states.element_size()


def lower_layers(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    head: Collection[str],
    room: Callable[[], tuple[int, int]],
) -> LowerLayers | None:
    """The layers that can be passed by when these parameters are trained: None where there are none, or where
    something else than layers and the head is trained. ``room`` gives the bytes that may be kept where the
    model is, and those in main memory.
    """
    found = lowest_stack(model)
    if found is None:
        return None
    (stack, layers), above = found, _above(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first = len(layers) - 1  # with nothing trained in the stack, its last layer is where states are put in
    for name, parameter in parameters.items():
        if name in head:
            continue
        place = names.get(id(parameter), "")
        if above is not None and layer_of(place, above) is not None:
            continue
        layer = layer_of(place, stack)
        if layer is None:
            return None
        first = min(first, layer)
    return LowerLayers(layers, first, *room()) if first else None


def in_upper_layers(model: Any, names: Collection[str], first: int) -> set[str]:
    """Those names of parameters or modules that belong to layers from ``first`` on. Of an encoder-decoder,
    the encoder's layers are counted, and all of the decoder's are upper ones.

    Raises:
        ValueError: the model has no single stack of layers, or no such layer; says which are allowed.
    """
    found, above = lowest_stack(model), _above(model)
    if found is None or (above is None and getattr(model.config, "is_encoder_decoder", False)):
        raise ValueError("the model has no single stack of layers; leave it at 0")
    stack, layers = found
    if first > len(layers):
        where = "the model" if above is None else "the model's encoder"
        raise ValueError(f"{where} has {len(layers)} layers; allowed: 0 to {len(layers)}")
    numbers = {name: layer_of(name, stack) for name in names}
    return {
        name
        for name, number in numbers.items()
        if (number is not None and number >= first) or (above and layer_of(name, above) is not None)
    }
