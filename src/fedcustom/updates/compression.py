"""Changes of named tensors in fewer bytes, and back.

A change is what training did to the tensors that were sent: new minus old. Its tensors are laid end to end
in the order of their names, as one stream of n float32 numbers, so that the cost does not grow with the
number of tensors. Names, shapes and dtypes do not travel, for the receiver knows them from what it asked.

=========  ==================================================================  ========================
kind       what travels                                                        bytes
=========  ==================================================================  ========================
none       the tensors as they are                                             those of their dtypes
float16    ``numbers`` float16 (n), ``scales`` bfloat16 (1)                    2 n + 2
bfloat16   ``numbers`` bfloat16 (n)                                            2 n
int8       ``numbers`` int8 (n), ``scales`` bfloat16 (n / block)               1.016 n at block 128
int4       ``numbers`` uint8 (n / 2), ``scales`` bfloat16 (n / block)          0.531 n at block 64
top_k      ``gaps`` uint8, ``numbers`` float16 (k), ``scales`` bfloat16 (1)    3 k + 2 at gaps below 128
=========  ==================================================================  ========================

Lengths are rounded up. Scales are bfloat16, not float16: as many bytes, but float32's range, so that no
block's scale becomes 0 or infinite however small or large its numbers are. Numbers are divided by the scale
*as it travels*, so its rounding makes a block's error at most 1.004 times as large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import WireError
from ..core.tensors import Tensors, add, combine, is_finite, subtract, zeros_like
from .settings import CompressionSettings

BLOCKS = {"int8": 128, "int4": 64}
"""How many numbers share a scale if the recipe does not say."""

NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)
"""The 16 levels of NormalFloat (Dettmers et al. 2023, QLoRA, appendix E)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST = torch.finfo(torch.bfloat16).tiny
LARGEST = torch.finfo(torch.bfloat16).max
VARINT_BYTES = 5


def compress(change: Mapping[str, Tensor], settings: CompressionSettings) -> Tensors:
    """Pack a change; the result can travel, and is the same for the same change.

    With x a block's numbers and s its scale, rounded to bfloat16:

    - ``int8`` (absmax): ``s = max|x| / 127``, ``q = round(x / s)``; ``|x - s q| <= s / 2``.
    - ``int4`` (NF4): ``s = max|x|``, q the index of the level in :data:`NF4` nearest to ``x / s``;
      ``|x - s NF4[q]| <= 0.152 s``. Two indices a byte, the first in the low half. Measured at block 64, the
      root mean square of the errors over that of the numbers is 0.092 on normal and 0.123 on Student's t data
      (3 degrees of freedom); integers -7..7 give 0.108 and 0.182, and with the best of nine scales for each
      block 0.100 and 0.173. (On uniform data plain integers win, 0.070 to 0.091.)
    - ``top_k``: the ``k = ceil(fraction n)`` largest ``|x|`` (of equals, the first), as float16 numbers and
      as gaps: how many numbers were left out before each, as LEB128 varints (seven bits a byte, low bits
      first; the high bit says that more follow).
    - ``float16``, also of top_k's numbers: ``q = x / s``, s the power of two that puts the message's
      ``max|x|`` in [2^14, 2^15). Nothing overflows, and numbers down to 2^-28 of the largest keep float16's
      precision.
    - ``bfloat16``: rounded; what would become infinite becomes the largest number.

    Zero stays zero in every kind. A scale is at least 2^-126; numbers that would need a smaller one lose
    precision. The cost is linear in n: 25 million numbers take half a second to one and a half on one core.

    Raises:
        WireError: a tensor is not float32, float16 or bfloat16, or holds a NaN or an infinity.
    """
    _check_dtypes(change)
    _check_finite(change)
    if settings.kind == "none":
        return {name: tensor.detach() for name, tensor in change.items()}
    flat = _flatten(change)
    match settings.kind:
        case "float16":
            return _to_float16(flat)
        case "int8":
            blocks = _blocks(flat, _block(settings))
            scales = _scales(blocks, 127)
            numbers = (blocks / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
            return {"numbers": numbers.flatten()[: len(flat)].contiguous(), "scales": scales}
        case "int4":
            blocks = _blocks(flat, _block(settings))
            scales = _scales(blocks, 1)
            indices = _nearest_level(blocks / scales.float()[:, None]).flatten()[: len(flat)]
            return {"numbers": _pack_pairs(indices), "scales": scales}
        case "top_k":
            kept = _largest(flat, _kept(len(flat), settings))
            gaps = torch.diff(kept, prepend=kept.new_tensor([-1])) - 1
            return {"gaps": pack_varints(gaps), **_to_float16(flat[kept])}
        case "bfloat16":
            return {"numbers": _cast(flat, torch.bfloat16)}


def decompress(
    packed: Mapping[str, Tensor], like: Mapping[str, Tensor], settings: CompressionSettings
) -> Tensors:
    """The change that :func:`compress` packed, up to what the kind loses, in the shapes and dtypes of
    ``like`` and on its devices. Numbers beyond the range of a dtype become its largest.

    Nothing in ``packed`` is trusted; what is accepted decodes to finite numbers.

    Raises:
        WireError: names, dtypes or lengths are not those that ``like`` and ``settings`` call for, a scale is
            not positive and finite, a number is not finite or not in the kind's range, an index is out of
            range.
    """
    _check_dtypes(like)
    if settings.kind == "none":
        _check_layout(packed, {name: (tensor.dtype, tensor.shape) for name, tensor in like.items()})
        _check_finite(packed)
        return {name: packed[name].to(tensor.device) for name, tensor in like.items()}
    count = sum(tensor.numel() for tensor in like.values())
    _check_layout(packed, _layout(count, settings))
    _check_finite({name: tensor for name, tensor in packed.items() if tensor.dtype.is_floating_point})
    if "scales" in packed and not bool((packed["scales"] > 0).all()):
        raise WireError("scales: must be positive")
    return _unflatten(_unpack(packed, count, settings), like)


def compress_with_feedback(
    change: Mapping[str, Tensor], residual: Mapping[str, Tensor], settings: CompressionSettings
) -> tuple[Tensors, Tensors]:
    """Pack a change together with what earlier rounds lost; also returns what is lost now.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, algorithm 1), with C compression followed by
    decompression, Delta_t the change and e_t the residual::

        p_t = Delta_t + e_t
        sent_t = C(p_t)
        e_{t+1} = p_t - C(p_t),   e_0 = 0

    so that ``sum_t sent_t + e_{T+1} = sum_t Delta_t``: nothing is lost, it comes later. The residual is
    float32, in the shapes of the change, and holds what rounding to the change's dtypes loses too. An empty
    ``residual`` is zero. Costs a compression and a decompression.

    Raises:
        WireError: see :func:`compress`.
        KeyError: the residual has other names than the change.
    """
    _check_dtypes(change)
    wanted = {name: tensor.detach().float() for name, tensor in change.items()}
    wanted = add(wanted, residual or zeros_like(wanted))
    if settings.kind == "none":
        _check_finite(wanted)
        packed = combine(lambda number, tensor: _cast(number, tensor.dtype), wanted, change)
    else:
        packed = compress(wanted, settings)
    return packed, subtract(wanted, decompress(packed, change, settings))


def pack_varints(numbers: Tensor) -> Tensor:
    """Non-negative int64 numbers below 2^35 as LEB128 bytes, one to five for each."""
    groups = numbers[:, None] >> (7 * torch.arange(VARINT_BYTES, device=numbers.device))
    used = groups > 0
    used[:, 0] = True
    return ((groups & 127) | ((groups > 127).long() << 7))[used].to(torch.uint8)


def unpack_varints(packed: Tensor, count: int) -> Tensor:
    """The ``count`` int64 numbers that :func:`pack_varints` packed.

    Raises:
        WireError: the bytes do not hold ``count`` numbers of at most five bytes each.
    """
    last = torch.nonzero(packed < 128).flatten()
    lengths = torch.diff(last, prepend=last.new_tensor([-1]))
    if len(last) != count or int(lengths.sum()) != len(packed) or bool((lengths > VARINT_BYTES).any()):
        raise WireError(f"gaps: {len(packed)} bytes that are not {count} varints")
    number = torch.repeat_interleave(lengths)
    place = torch.arange(len(packed), device=packed.device) - (last - lengths + 1)[number]
    return torch.zeros_like(last).index_add_(0, number, (packed & 127).long() << (7 * place))


def _unpack(packed: Mapping[str, Tensor], count: int, settings: CompressionSettings) -> Tensor:
    """The stream of ``count`` float32 numbers in a message whose layout has been checked."""
    numbers = packed["numbers"]
    match settings.kind:
        case "int8":
            if bool((numbers == -128).any()):
                raise WireError("numbers: -128 is out of range; allowed: -127 to 127")
            return _unscale(numbers.float(), packed["scales"], _block(settings))
        case "int4":
            if count % 2 and int(numbers[-1]) > 15:
                raise WireError("numbers: the unused half of the last byte is not zero")
            return _unscale(_unpack_pairs(numbers)[:count], packed["scales"], _block(settings))
        case "top_k":
            gaps = unpack_varints(packed["gaps"], len(numbers))
            kept = torch.cumsum(gaps + 1, 0) - 1  # may wrap around, but not if every gap is in range
            if bool((gaps >= count).any()) or (len(kept) and int(kept[-1]) >= count):
                raise WireError(f"gaps: an index is out of range; allowed: 0 to {count - 1}")
            flat = torch.zeros(count, device=numbers.device)
            flat[kept] = numbers.float() * packed["scales"].float()
            return flat
        case "float16":
            return numbers.float() * packed["scales"].float()
        case _:
            return numbers.float()


def _layout(
    count: int, settings: CompressionSettings
) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """Dtype and shape of each packed tensor of ``count`` numbers; None: one axis of any length."""
    match settings.kind:
        case "int8":
            scales = math.ceil(count / _block(settings))
            return {"numbers": (torch.int8, (count,)), "scales": (torch.bfloat16, (scales,))}
        case "int4":
            scales = math.ceil(count / _block(settings))
            return {"numbers": (torch.uint8, ((count + 1) // 2,)), "scales": (torch.bfloat16, (scales,))}
        case "top_k":
            kept = _kept(count, settings)
            half = {"numbers": (torch.float16, (kept,)), "scales": (torch.bfloat16, (min(count, 1),))}
            return {"gaps": (torch.uint8, None), **half}
        case "float16":
            return {"numbers": (torch.float16, (count,)), "scales": (torch.bfloat16, (min(count, 1),))}
        case _:
            return {"numbers": (torch.bfloat16, (count,))}


def _check_layout(
    packed: Mapping[str, Tensor], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...] | None]]
) -> None:
    if packed.keys() != layout.keys():
        raise WireError(f"a compressed change holds {sorted(packed)}; allowed: {sorted(layout)}")
    for name, (dtype, shape) in layout.items():
        tensor = packed[name]
        if tensor.dtype != dtype or (tensor.dim() != 1 if shape is None else tensor.shape != shape):
            allowed = f"{dtype} {'(any)' if shape is None else tuple(shape)}"
            raise WireError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; allowed: {allowed}")


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise WireError(
                f"{name}: {tensor.dtype} cannot be compressed; allowed: float32, float16, bfloat16"
            )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not is_finite({name: tensor}):
            raise WireError(f"{name}: a number is NaN or infinite")


def _flatten(change: Mapping[str, Tensor]) -> Tensor:
    """The tensors end to end in the order of their names, as float32."""
    parts = [change[name].detach().flatten().float() for name in sorted(change)]
    return torch.cat(parts) if parts else torch.zeros(0)


def _unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """The stream cut into like's shapes and cast to its dtypes, in like's order."""
    names = sorted(like)
    parts = dict(zip(names, torch.split(flat, [like[name].numel() for name in names]), strict=True))
    return {
        name: _cast(parts[name].view(tensor.shape), tensor.dtype).to(tensor.device)
        for name, tensor in like.items()
    }


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, in which what would be infinite is the largest number."""
    limit = torch.finfo(dtype).max
    return tensor.clamp(-limit, limit).to(dtype)


def _block(settings: CompressionSettings) -> int:
    return settings.block or BLOCKS[settings.kind]


def _kept(count: int, settings: CompressionSettings) -> int:
    return min(count, math.ceil(settings.fraction * count))


def _blocks(flat: Tensor, block: int) -> Tensor:
    """(n) as (n / block rounded up, block), filled up with zeros."""
    return functional.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _scales(blocks: Tensor, largest: int) -> Tensor:
    """What divides each row so that its largest magnitude is ``largest``; never zero or infinite: (rows)."""
    return (blocks.abs().amax(1) / largest).clamp(SMALLEST, LARGEST).bfloat16()


def _unscale(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each number times the scale of its block: (n)."""
    return (_blocks(numbers, block) * scales.float()[:, None]).flatten()[: len(numbers)]


def _to_float16(numbers: Tensor) -> Tensors:
    largest = float(numbers.abs().max()) if len(numbers) else 0.0
    exponent = max(math.frexp(largest)[1] - 15, -126)
    scales = torch.full((min(len(numbers), 1),), 2.0**exponent, dtype=torch.bfloat16, device=numbers.device)
    return {"numbers": (numbers / scales.float()).half(), "scales": scales}


def _nearest_level(numbers: Tensor) -> Tensor:
    """The index of the nearest level: how many midpoints between levels lie below. (On the CPU faster than
    ``torch.bucketize``, and without its eight bytes a number.)
    """
    indices = torch.zeros_like(numbers, dtype=torch.uint8)
    for midpoint in ((NF4[1:] + NF4[:-1]) / 2).tolist():
        indices += numbers > midpoint
    return indices


def _pack_pairs(indices: Tensor) -> Tensor:
    """Two numbers below 16 a byte, the first in the low half: (n) to (n / 2 rounded up)."""
    pairs = functional.pad(indices, (0, len(indices) % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack_pairs(packed: Tensor) -> Tensor:
    """The levels of two indices a byte: (m) to (2 m)."""
    levels = torch.stack([NF4.repeat(16), NF4.repeat_interleave(16)], dim=1).to(packed.device)
    return levels.index_select(0, packed.int()).flatten()


def _largest(flat: Tensor, kept: int) -> Tensor:
    """The sorted indices of the ``kept`` largest magnitudes; of equals, the first."""
    if not kept:
        return torch.zeros(0, dtype=torch.int64, device=flat.device)
    magnitude = flat.abs()
    threshold = torch.kthvalue(magnitude, len(flat) - kept + 1).values
    chosen = magnitude > threshold
    equals = torch.nonzero(magnitude == threshold).flatten()
    chosen[equals[: kept - int(chosen.sum())]] = True
    return torch.nonzero(chosen).flatten()
