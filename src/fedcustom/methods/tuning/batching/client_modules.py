"""Client modules: layers whose trained tensors differ from client to client within a batch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....models.products import FewShapesLinear, product
from ....models.quantised_layers import QuantisedLinear
from .client_products import client_products


class BatchTensors(threading.local):
    """What a stand-in acts with; each thread that passes through the model has its own.

    ``own`` holds the trained tensors under their names in the module, stacked to (clients, ...); the others
    stay the module's. ``owners``, (rows,) in rising order, says whose each of the batch's rows is, and
    ``counts`` how many rows each client has. ``scale``, (rows,), is what a trained product is multiplied by.
    """

    def __init__(self) -> None:
        self.own: dict[str, Tensor] = {}
        self.owners = torch.empty(0, dtype=torch.long)
        self.counts: list[int] = []
        self.scale: Tensor | None = None


class ClientModule(nn.Module):
    """Stands in for a module while several clients share a batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.given = BatchTensors()

    @property
    def own(self) -> dict[str, Tensor]:
        """The clients' tensors."""
        return self.given.own

    def __getattr__(self, name: str) -> Any:
        """What code asks of the module that this one stands in for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def vector(self, name: str, like: Tensor) -> Tensor:
        """A trained vector of each row's client; it broadcasts over ``like``, (rows, ..., width)."""
        rows = self.own[name].flatten(1)[self.given.owners].to(like.dtype)
        return rows.view(len(rows), *[1] * (like.dim() - 2), -1)

    def product(self, states: Tensor, name: str) -> Tensor:
        """``s_k x_k W_k^T`` of states (rows, ..., in) and a trained matrix (clients, out, in)."""
        if (scale := self.given.scale) is not None:
            states = states * scale.view(-1, *[1] * (states.dim() - 1)).to(states.dtype)
        return client_products(states, self.own[name], self.given.counts)


class ClientMatrix(ClientModule):
    """``nn.Linear`` with a weight or a bias of each client's own: ``y_k = x_k W_k^T + b_k``."""

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype or device."""
        weight = self.own.get("weight")
        return weight if weight is not None else self.module.weight  # type: ignore[return-value]

    def forward(self, states: Tensor) -> Tensor:
        """(rows, ..., in) to (rows, ..., out)."""
        module: Any = self.module
        if "weight" in self.own:
            result = self.product(states, "weight")
        elif isinstance(module, QuantisedLinear):
            result = module.product(states)
        elif isinstance(module, Conv1D):
            result = states @ module.weight
        else:
            result = product(states, module.weight)
        if "bias" in self.own:
            return result + self.vector("bias", result)
        return result if module.bias is None else result + module.bias.to(result.dtype)


class ClientInnerProduct(ClientModule):
    """Fed-SB's ``B R_k``."""

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype or device."""
        return self.own["weight"]

    def forward(self, inner: Tensor) -> Tensor:
        """(rows, ..., rank) to (rows, ..., out)."""
        outer: Any = self.module.outer
        return nn.functional.linear(self.product(inner, "weight"), outer.to(inner.dtype))


class ClientNorm(ClientModule):
    """A normalisation layer with a gain or bias of each client's own: ``y_k = n(x_k) (offset + w_k) + b_k``.

    ``offset`` is what the layer's code adds to its weight: 1 in Gemma's layers, 0 in most others.
    """

    def __init__(self, module: nn.Module, offset: float) -> None:
        super().__init__(module)
        self.offset = offset
        # In a list, so that it is no part of the model.
        self.normalised = [self._plain()]

    def forward(self, states: Tensor, *more: Any, **named: Any) -> Tensor:
        """(rows, ..., width), normalised."""
        if self.normalised[0].weight.dtype != self.module.weight.dtype:
            self.normalised = [self._plain()]
        result: Tensor = self.normalised[0](states, *more, **named)
        for name in ("weight", "bias"):
            value = getattr(self.module, name, None)
            if name in self.own:
                value = self.vector(name, result)
            elif value is not None:
                value = value.to(result.dtype)
            if value is not None:
                result = result + value if name == "bias" else result * (value + self.offset)
        return result

    def _plain(self) -> nn.Module:
        """The layer with a gain of one and without a bias."""
        return with_values(self.module, weight=1.0 - self.offset, bias=0.0)


def with_values(module: nn.Module, **values: float) -> nn.Module:
    """The same layer with these constants in place of its parameters."""
    result = copy.copy(module)
    result._parameters = {
        name: nn.Parameter(torch.full_like(p, values[name]), requires_grad=False)
        for name, p in module._parameters.items()
        if p is not None
    } | {name: None for name, p in module._parameters.items() if p is None}
    return result


def gain_offset(module: nn.Module) -> float | None:
    """What a normalisation layer adds to its weight before it multiplies by it: 0 or 1. None where the layer
    is no ``n(x) (offset + weight) + bias``, with a weight and a bias of its last dimension.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or not parameters.keys() <= {"weight", "bias"}:
        return None
    if any(True for _ in module.children()) or any(p.shape != weight.shape for p in parameters.values()):
        return None
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, len(weight), generator=generator).to(weight)
    try:
        with torch.no_grad():
            none, one, half = (with_values(module, weight=w, bias=0.0)(states) for w in (0.0, 1.0, 0.5))
            shifted = with_values(module, weight=1.0, bias=0.25)(states) - one
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return None
    if none.shape != states.shape or not _near(half, (none + one) / 2):
        return None
    if "bias" in parameters and not _near(shifted, torch.full_like(one, 0.25)):
        return None
    if _near(none, torch.zeros_like(none)):
        return 0.0
    return 1.0 if _near(one, 2 * none) else None


def _near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=0.02, atol=0.02)


class ClientEmbedding(ClientModule):
    """Virtual tokens of each client's own: the same ids in every row."""

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype or device."""
        return self.own["weight"]

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of (rows, tokens) to (rows, tokens, width)."""
        return self.own["weight"][:, ids[0]][self.given.owners]

    def prompts(self, batch_size: int, **_: Any) -> Tensor:
        """All virtual tokens, (rows, tokens, width)."""
        return self.own["weight"][self.given.owners]


class ClientScale(ClientModule):
    """PEFT's IA3 layer: the input or the output of a frozen matrix times a vector of each client's own."""

    def forward(self, states: Tensor) -> Tensor:
        """(rows, ..., in) to (rows, ..., out)."""
        layer: Any = self.module
        (name,) = self.own
        if layer.is_feedforward:
            result: Tensor = layer.base_layer(states * self.vector(name, states))
            return result
        result = layer.base_layer(states)
        return result * self.vector(name, result)


class ClientSlots(ClientModule):
    """Attention slots of each client's own."""

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries (rows, tokens, heads, size) to what is added to the heads' outputs and to the queries."""
        slots: Any = self.module
        frozen = {n: p for n, p in slots.named_parameters(recurse=False) if n not in self.own}
        own = {name: tensor[self.given.owners] for name, tensor in self.own.items()}
        own |= {name: p.expand(len(query), *p.shape) for name, p in frozen.items()}
        result: tuple[Tensor, Tensor | None] = slots.read(query, own, "rh")
        return result


def stand_ins(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> ClientModules | None:
    """Modules that can take the place of those that hold the parameters; None where one of them is of a kind
    that cannot be shared (``parameters`` by the names under which they travel).
    """
    from peft.tuners.prefix_tuning import PrefixEncoder
    from peft.tuners.prompt_tuning import PromptEmbedding

    wanted = {id(parameter): name for name, parameter in parameters.items()}
    prompts = [m.embedding for m in model.modules() if isinstance(m, PrefixEncoder | PromptEmbedding)]
    found: dict[nn.Module, tuple[ClientModule, dict[str, str]]] = {}
    for module in model.modules():
        held = {name: wanted[id(p)] for name, p in _parameters(module).items() if id(p) in wanted}
        if not held:
            continue
        kind = ClientEmbedding if module in prompts else _kind(module, set(held))
        if kind is None:
            return None
        found[module] = (kind(module), held)
        for name in held.values():
            wanted = {key: other for key, other in wanted.items() if other != name}
    return None if wanted else ClientModules(model, found)


class ClientModules:
    """The modules that take part, and where they stand in the model."""

    def __init__(
        self, model: nn.Module, found: Mapping[nn.Module, tuple[ClientModule, dict[str, str]]]
    ) -> None:
        from peft import PeftModel, PeftType

        self.found = list(found.values())
        self.places = [
            (parent, name, child, found[child][0])
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None and child in found
        ]
        # PEFT asks for one row of a soft prompt and repeats it.
        self.prompted = [
            (m, stand_in)
            for m in model.modules()
            if isinstance(m, PeftModel) and m.active_peft_config.peft_type == PeftType.PROMPT_TUNING
            for stand_in, _ in self.found
            if isinstance(stand_in, ClientEmbedding)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model holds the stand-ins."""
        for parent, name, _, stand_in in self.places:
            parent._modules[name] = stand_in
        for model, prompt in self.prompted:
            model.__dict__["get_prompt"] = prompt.prompts
        try:
            yield
        finally:
            for parent, name, module, _ in self.places:
                parent._modules[name] = module
            for model, _ in self.prompted:
                del model.__dict__["get_prompt"]

    def carry(self) -> Callable[[], AbstractContextManager[None]]:
        """The context in which a pass of this thread can be repeated, in any thread
        (:mod:`fedcustom.models.checkpointing`).
        """
        held = [(stand_in.given, dict(vars(stand_in.given))) for stand_in, _ in self.found]

        @contextmanager
        def again() -> Iterator[None]:
            before = [dict(vars(given)) for given, _ in held]
            for given, values in held:
                vars(given).update(values)
            try:
                yield
            finally:
                for (given, _), values in zip(held, before, strict=True):
                    vars(given).update(values)

        return again

    def give(
        self,
        tensors: Mapping[str, Tensor],
        owners: Tensor,
        scale: Tensor | None = None,
        scaled: Collection[str] = (),
    ) -> None:
        """In the thread that calls, let the stand-ins act with these tensors, stacked to (clients, ...), on
        rows of these owners. Products of the ``scaled`` matrices are multiplied by ``scale``, (clients,).
        """
        counts = torch.bincount(owners).tolist()
        for stand_in, held in self.found:
            given = stand_in.given
            given.own = {name: tensors[other] for name, other in held.items() if other in tensors}
            device = next((tensor.device for tensor in given.own.values()), owners.device)
            given.owners, given.counts = owners.to(device), counts  # layers may lie on several devices
            given.scale = None
            if scale is not None and any(other in scaled for other in held.values()):
                given.scale = scale[owners.to(scale.device)].to(device)


Kind = Callable[[nn.Module], ClientModule]


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module holds itself, or in the dict of its adapters."""
    from peft.tuners.ia3 import IA3Layer

    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, IA3Layer):
        own |= dict(module.ia3_l.items())
    return own


def _kind(module: nn.Module, names: set[str]) -> Kind | None:
    """The stand-in for a module of which the named parameters are trained."""
    from peft.tuners.ia3 import Linear as Ia3Linear

    from ...lora.method import InnerProduct
    from ...prefix.attention_slots import AttentionSlots

    if isinstance(module, AttentionSlots):
        return ClientSlots
    if isinstance(module, Ia3Linear):
        return ClientScale
    if isinstance(module, InnerProduct):
        return ClientInnerProduct
    if type(module) in (nn.Linear, FewShapesLinear) or isinstance(module, QuantisedLinear):
        return ClientMatrix
    if isinstance(module, Conv1D):
        return ClientMatrix if names == {"bias"} else None
    if "norm" in type(module).__name__.lower() and (offset := gain_offset(module)) is not None:
        return partial(ClientNorm, offset=offset)
    return None
