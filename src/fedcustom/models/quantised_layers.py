"""Quantised base models: linear layers whose frozen weights are stored in few bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.environment import free_memory
from ..core.errors import ExportError, ModelError
from ..core.tensors import Tensors
from .memory_mapping import give_back, leave_memory
from .quantisation import Quantization, Scheme, scheme


class QuantisedLinear(nn.Linear):
    """A linear layer with a frozen weight of few bits: ``y = x W^T + b``, with W unpacked for each product.

    The stored tensors are buffers. ``weight`` gives the unpacked matrix in float32; nothing can be written to
    it. The backward pass unpacks the matrix again, so that passes keep no copies. ``place`` is the layer's
    name in the base model.
    """

    def __init__(self, layer: nn.Linear, chosen: Scheme, place: str = "") -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scheme, self.place = chosen, place
        self.stored: list[str] = []
        with torch.no_grad():
            for name, tensor in chosen.pack(layer.weight.detach()).items():
                self.register_buffer(name, tensor, persistent=True)
                self.stored.append(name)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The unpacked matrix, (out, in), in float32; meanwhile (:meth:`with_weight`) the exact one."""
        exact = self._parameters.get("weight")
        return self.unpacked(torch.float32) if exact is None else exact

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The same in another dtype."""
        shape = torch.Size((self.out_features, self.in_features))
        return self.scheme.unpack(self.tensors(), shape, dtype)

    def tensors(self) -> Tensors:
        """What is stored, by name; nothing while the layer has an exact weight."""
        return {name: self._buffers[name] for name in self.stored if name in self._buffers}  # type: ignore[misc]

    @contextlib.contextmanager
    def with_weight(self, weight: Tensor) -> Iterator[None]:
        """For the time of the context the layer is a plain one with this weight."""
        stored = {name: self._buffers.pop(name) for name in self.stored}
        self._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
        try:
            yield
        finally:
            del self._parameters["weight"]
            self._buffers.update(stored)

    def forward(self, states: Tensor) -> Tensor:
        """(..., in) to (..., out), in autocast's dtype, or that of the states."""
        result = self.product(states)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def product(self, states: Tensor) -> Tensor:
        """The same without the bias."""
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        if (exact := self._parameters.get("weight")) is not None:
            return nn.functional.linear(states.to(dtype), exact.to(dtype))
        result: Tensor = _Product.apply(states.to(dtype), self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """As ``nn.Linear`` prints itself, with the scheme."""
        return f"{super().extra_repr()}, quantised={self.scheme.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """Another device for what is stored, but no other dtype: bytes and scales are one format."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        kept = {name: moved(tensor) for name, tensor in self.tensors().items()}
        for name in kept:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(kept)
        return self


class _Product(torch.autograd.Function):
    """A product with the unpacked matrix, which is unpacked again for the gradient of the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(states, layer.unpacked(states.dtype))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = outputs
        return gradient @ ctx.layer.unpacked(gradient.dtype), None


@dataclass(frozen=True)
class Quantised:
    """What was quantised: ``matrices`` of the body's ``of`` matrices, from ``before`` bytes to ``after``;
    ``kept`` names those that were not. ``load_exact`` gives the model as it was before, on a processor.
    """

    name: Quantization
    matrices: int
    of: int
    before: int
    after: int
    kept: tuple[str, ...]
    load_exact: Callable[[], Any]

    def in_words(self) -> str:
        """One line for the user."""
        said = (
            f"{self.matrices} of {self.of} matrices in {self.name}, {self.before / 1e6:.1f} MB stored in "
            f"{self.after / 1e6:.1f} MB"
        )
        if self.kept:
            more = f" and {len(self.kept) - 2} more" if len(self.kept) > 2 else ""
            said += f"; not quantised: {', '.join(self.kept[:2])}{more}"
        return said


def quantise(
    model: Any,
    name: Quantization,
    head: Collection[str],
    load_exact: Callable[[], Any],
    *,
    base: str = "model.base",
) -> Quantised:
    """Quantise the linear layers of a model's body, in place; embeddings, the output layer and the
    classification head (top-level modules, ``head``) stay as they are.

    Args:
        model: The loaded model.
        name: The scheme.
        head: Top-level modules that are trained.
        load_exact: Loads the model again without quantisation.
        base: What the recipe calls the model.

    Raises:
        ModelError: the scheme does not run here, or no matrix of the model fits it.
    """
    names = _body_matrices(model, head)
    chosen: Scheme | None = None
    kept, done, before, after = list[str](), 0, 0, 0
    for full in names:
        place, _, kind = full.rpartition(".")
        layer = model.get_submodule(place)
        weight = getattr(layer, kind)
        chosen = chosen or scheme(name, weight.device)
        if type(layer) is not nn.Linear or layer.in_features % chosen.group:
            kept.append(place)
            continue
        before += weight.numel() * weight.element_size()
        quantised = QuantisedLinear(layer, chosen, place)
        model.set_submodule(place, quantised)
        leave_memory({full: weight})  # where it is mapped from the checkpoint's file
        del layer, weight
        give_back()  # what packing took for a while lies between what is kept
        done, after = done + 1, after + _size(quantised.tensors().values())
    if not done:
        kinds = sorted({type(model.get_submodule(place)).__name__ for place in kept})
        raise ModelError(
            f"model.quantization = {name!r} does not fit {base}: none of its {len(names)} matrices is that "
            f"of a linear layer whose rows are multiples of {chosen.group if chosen else 1} numbers "
            f"({', '.join(kinds)}); leave it out"
        )
    return Quantised(name, done, len(names), before, after, tuple(kept), load_exact)


def _body_matrices(model: Any, head: Collection[str]) -> list[str]:
    """The names of a model's matrices but for embeddings, the output layer and the head."""
    others = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        others.add(id(output.weight))
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.split(".")[0] not in head and id(parameter) not in others
    ]


def quantised_layers(model: nn.Module) -> list[QuantisedLinear]:
    """A model's quantised layers."""
    return [module for module in model.modules() if isinstance(module, QuantisedLinear)]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's own weights, quantised or not."""
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return own[0].device


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are stored."""
    return _size(model.parameters()) + sum(_size(m.tensors().values()) for m in quantised_layers(model))


def count_weights(model: nn.Module) -> int:
    """How many weights a model has, quantised ones among them."""
    packed = sum(layer.in_features * layer.out_features for layer in quantised_layers(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def exact_weights(model: nn.Module, quantised: Quantised | None) -> Iterator[None]:
    """For the time of the context the model has the weights of the checkpoint, which are read again, in place
    of the quantised ones; what was trained stays. Without ``quantised`` nothing changes.

    Raises:
        ExportError: they take more memory than is free.
    """
    if quantised is None:
        yield
        return
    needed, free = 4 * count_weights(model), free_memory(torch.device("cpu"))
    if needed > free:
        raise ExportError(
            f"the base is quantised in {quantised.name}, and what is exported is checked or written with its "
            f"exact weights: they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
        )
    exact = dict(quantised.load_exact().named_parameters())
    with contextlib.ExitStack() as stack:
        for layer in quantised_layers(model):
            device = layer.tensors()["numbers"].device
            stack.enter_context(layer.with_weight(exact[f"{layer.place}.weight"].to(device)))
        del exact
        yield
