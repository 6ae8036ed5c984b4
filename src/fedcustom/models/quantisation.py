"""Quantisation schemes: a matrix in few bits, as named tensors, and back.

Weights are rounded when the model is loaded and stay as they are; products are made with the matrix that
:attr:`Scheme.unpack` gives. The quantisation itself is that of ``torchao`` (int8, int4) and ``bitsandbytes``
(nf4). Their linear layers are not used: in training, those of ``torchao`` keep an unpacked copy of every
matrix for the backward pass (int8) or have none (int4).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.library_errors import in_one_line
from ..core.tensors import Tensors

Quantization = Literal["int8", "int4", "nf4"]

GROUP = 64
"""Numbers of a row that share a scale in int4 and nf4."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored.

    ``pack`` gives the tensors of a weight of (out, in), ``unpack`` a weight of that shape and dtype from
    them. A row's length must be a multiple of ``group``. ``package`` does the quantisation.
    """

    name: Quantization
    package: str
    group: int
    pack: Callable[[Tensor], Tensors]
    unpack: Callable[[Mapping[str, Tensor], torch.Size, torch.dtype], Tensor]


def scheme(name: Quantization, device: torch.device) -> Scheme:
    """The scheme of that name, for a device.

    Raises:
        ModelError: its package is not installed, or cannot run on the device.
    """
    found = SCHEMES[name]
    if importlib.util.find_spec(found.package) is None:
        raise ModelError(
            f"model.quantization = {name!r}: needs the package {found.package}: "
            "pip install 'fedcustom[quantization]'"
        )
    if device.type not in ("cpu", "cuda"):
        raise ModelError(
            f"model.quantization = {name!r}: runs on cpu and cuda; this run trains on {device.type}"
        )
    try:
        found.unpack(found.pack(torch.ones(2, GROUP, device=device)), torch.Size((2, GROUP)), torch.float32)
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"model.quantization = {name!r}: {found.package} does not run on this {device.type}: "
            f"{in_one_line(error)}"
        ) from error
    return found


def _pack_int8(weight: Tensor) -> Tensors:
    """Symmetric, one scale a row: w = s q with q from -128 to 127."""
    from torchao.quantization import Int8Tensor, PerRow

    packed: Any = Int8Tensor.from_hp(weight.float(), PerRow())
    return {"numbers": packed.qdata, "scales": packed.scale.reshape(-1, 1)}


def _unpack_int8(tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (tensors["numbers"] * tensors["scales"]).to(dtype)


def _pack_int4(weight: Tensor) -> Tensors:
    """Asymmetric, one scale s and zero point z for each :data:`GROUP` numbers of a row: w = s (q - z) with q
    and z from 0 to 15; two numbers a byte.
    """
    from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

    weight, block, most = weight.float(), (1, GROUP), 15
    scales, zeros = choose_qparams_affine(
        weight, MappingType.ASYMMETRIC, block, torch.uint8, 0, most,
        eps=torch.finfo(torch.float32).eps, scale_dtype=torch.float32, zero_point_dtype=torch.uint8,
    )  # fmt: skip
    scales, zeros = scales.view(len(weight), -1), zeros.view(len(weight), -1)
    scales = scales.to(torch.bfloat16)  # as it is stored, so that numbers are rounded for this scale
    numbers = quantize_affine(weight, block, scales.float(), zeros, torch.uint8, 0, most)
    pairs = numbers.view(len(weight), -1, 2)
    return {"numbers": pairs[..., 0] | (pairs[..., 1] << 4), "scales": scales, "zeros": zeros}


def _unpack_int4(tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    bytes_ = tensors["numbers"]
    numbers = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).view(shape[0], -1, GROUP)
    scales, zeros = (tensors[name].unsqueeze(-1) for name in ("scales", "zeros"))
    # q - z and its product with a bfloat16 scale are exact in float32, so one rounding is left.
    shifted = numbers.to(torch.int8) - zeros.to(torch.int8)
    return (shifted * scales.to(dtype)).view(shape)


def _pack_nf4(weight: Tensor) -> Tensors:
    """The 16 quantiles of a normal distribution, one scale for each :data:`GROUP` numbers; the scales in
    8 bits (QLoRA, Dettmers et al. 2023, section 3).
    """
    from bitsandbytes import functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.float().contiguous(), blocksize=GROUP, compress_statistics=True, quant_type="nf4"
    )
    return {
        "numbers": packed,
        "scales": state.absmax,
        "levels": state.code,
        "offset": state.offset,
        "scale_scales": state.state2.absmax,
        "scale_levels": state.state2.code,
    }


def _unpack_nf4(tensors: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional as bnb

    state_of: Any = bnb.QuantState
    outer = state_of(
        absmax=tensors["scale_scales"], blocksize=256, code=tensors["scale_levels"], dtype=torch.float32
    )
    known = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    state = state_of(
        absmax=tensors["scales"], shape=shape, code=tensors["levels"], blocksize=GROUP, quant_type="nf4",
        dtype=known, offset=tensors["offset"], state2=outer,
    )  # fmt: skip
    result: Tensor = bnb.dequantize_4bit(tensors["numbers"], state)
    return result.to(dtype)


SCHEMES: dict[Quantization, Scheme] = {
    "int8": Scheme("int8", "torchao", 1, _pack_int8, _unpack_int8),
    "int4": Scheme("int4", "torchao", GROUP, _pack_int4, _unpack_int4),
    "nf4": Scheme("nf4", "bitsandbytes", GROUP, _pack_nf4, _unpack_nf4),
}
