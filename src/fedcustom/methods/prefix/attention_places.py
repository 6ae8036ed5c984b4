"""Attention blocks of a model: the matrices that give queries and that take the heads' outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.pytorch_utils import Conv1D

from ...core.errors import ModelError
from ...models.load import Base
from ...models.padding import trial, trial_ids

QUERIES = ("q_proj", "query", "query_proj", "q", "q_lin", "q_b_proj")
OUTPUTS = ("o_proj", "out_proj", "output.dense", "dense", "o", "out_lin")
"""What architectures call the two matrices; used where a trial pass does not show them."""


@dataclass(frozen=True)
class Place:
    """One attention block, as :func:`~.attention_slots.add_slots` reads it; ``cached`` is how many numbers a
    key-value pair has in it.
    """

    query: str
    output: str
    heads: int
    size: int
    value_size: int
    first: int
    step: int
    cached: int

    def slot_size(self, *, shifts: bool) -> int:
        """How many numbers a slot beside the block has, with or without a shift of the query."""
        return self.heads * (self.size + self.value_size + shifts * self.size)

    def entry(self) -> dict[str, Any]:
        """The place in a configuration."""
        return {key: value for key, value in asdict(self).items() if key != "cached"}


@dataclass
class Call:
    """The pass of a matrix."""

    module: nn.Module
    inputs: Tensor
    output: Tensor


@dataclass
class Attention:
    """The pass of an attention block over rows of one token: the first row's ``query``, (heads, size), and
    ``output``, and all rows' ``keys``, (rows, key-value heads, size).
    """

    module: nn.Module
    query: Tensor
    keys: Tensor
    cached: int
    output: Tensor


def attention_places(base: Base) -> tuple[list[Place], list[str]]:
    """The attention blocks of the base model, each once, in the order of a pass, and the names of those that
    slots cannot stand beside.

    A trial pass over one token shows them: at position 0 no rotation changes a query, so the matrix whose
    output holds the queries of the block (in ``transformers``' attention interface) is seen by its numbers,
    and so is the one that takes the heads' outputs. Where heads are normalised, and in code that does not use
    the interface, the matrices are found by their names. A second pass over two rows shows whether both
    matrices see (rows, tokens, width), as slots need it, and take turns.

    Raises:
        ModelError: there is no block of which both matrices can be told.
    """
    names = {module: name for name, module in base.model.named_modules()}
    records = trial_records(base, [trial_ids(base)[1][:1]])
    found: dict[str, Place] = {}
    missed: dict[str, None] = {}
    seen: set[nn.Module] = set()
    for at, record in enumerate(records):
        if isinstance(record, Attention) and record.module in names:
            seen.update(record.module.modules())
            place = _seen(record, records[:at], records[at + 1 :], names) or _named(
                record.module, names, record
            )
            if place is None:
                missed[names[record.module]] = None
            else:
                found.setdefault(place.query, place)
    heads = getattr(base.model.config, "num_attention_heads", None)
    for module in names.keys() - seen:
        if any(_is_matrix(child) for name, child in module.named_children() if name in QUERIES):
            place = _named(module, names, None, heads)
            if place is None:
                missed[names[module]] = None
            elif place.query not in found:
                found[place.query] = place
    order = {name: number for number, name in enumerate(names.values())}
    calls = _calls(base, found.values())
    for query in list(found):
        if not _take_turns(calls[query]):
            del found[query]
            missed[query.rpartition(".")[0]] = None
    if not found:
        where = f" ({min(missed)})" if missed else ""
        raise ModelError(
            f"method.kind = 'memory' does not fit {base.name}: the matrices of its "
            f"{base.model.config.model_type} code that give queries and take the heads' outputs{where} "
            "cannot be told, or do not see texts row by row; use method lora, or feed-forward slots alone "
            "(method.slots = 0 and method.feed_forward_slots), where the model takes them"
        )
    return sorted(found.values(), key=lambda place: order[place.query]), sorted(missed, key=order.__getitem__)


def trial_records(base: Base, rows: list[list[int]]) -> list[Call | Attention]:
    """The passes of matrices and attention blocks over rows of one token each, in their order."""
    records: list[Call | Attention] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            records.append(Call(module, inputs[0].detach(), output.detach()))

    hooks = [m.register_forward_hook(note) for m in base.model.modules() if _is_matrix(m)]
    try:
        with _recorded(records):
            _pass(base, rows)
    finally:
        for hook in hooks:
            hook.remove()
    return records


def pass_one_token(base: Base) -> None:
    """A trial pass of the base model over one token, for what hooks see of it.

    Raises:
        ModelError: the model's code fails.
    """
    _pass(base, [trial_ids(base)[1][:1]])


def _pass(base: Base, rows: list[list[int]]) -> None:
    """A trial pass through the body of the base model. The decoder of two stacks reads a token less than the
    encoder, where that has more than one.
    """
    body: Any = getattr(base.model, base.model.base_model_prefix, base.model)
    ids = torch.tensor(rows, device=base.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.architecture == "encoder-decoder":
        inputs["decoder_input_ids"] = ids[:, : max(1, ids.shape[1] - 1)]
    if "use_cache" in inspect.signature(body.forward).parameters:
        inputs["use_cache"] = False

    def refusal(reason: str) -> str:
        return f"model.base: a trial pass through {base.name} fails: {reason}"

    with trial(body, refusal), torch.no_grad():
        body.eval()(**inputs)


ROWS = 2
"""Rows of the second trial pass; its texts have more tokens."""


def _calls(base: Base, places: Iterable[Place]) -> dict[str, list[tuple[str, torch.Size]]]:
    """The calls of each block's two matrices in a pass over two rows, and the shapes of queries and outputs;
    by the names of the queries' matrices.
    """
    calls: dict[str, list[tuple[str, torch.Size]]] = {place.query: [] for place in places}
    hooks = []
    for place in places:
        own = calls[place.query]

        def queries(_: Any, __: Any, output: Tensor, own: Any = own) -> None:
            own.append(("query", output.shape))

        def outputs(_: Any, inputs: tuple[Tensor, ...], own: Any = own) -> None:
            own.append(("output", inputs[0].shape))

        hooks.append(base.model.get_submodule(place.query).register_forward_hook(queries))
        hooks.append(base.model.get_submodule(place.output).register_forward_pre_hook(outputs))
    ids = trial_ids(base)[1]
    try:
        _pass(base, [(ids * 4)[: max(4, len(ids))]] * ROWS)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _take_turns(calls: Sequence[tuple[str, torch.Size]]) -> bool:
    """Whether each query is followed by the output of the same rows and tokens."""
    turns = list(zip(calls[::2], calls[1::2], strict=False))
    return (
        bool(turns)
        and all(
            (one, other) == ("query", "output")
            and len(given) == len(taken) == 3
            and given[:2] == taken[:2]
            and given[0] == ROWS
            for (one, given), (other, taken) in turns
        )
        and len(calls) % 2 == 0
    )


@contextmanager
def _recorded(records: list[Call | Attention]) -> Iterator[None]:
    """Meanwhile attention gives each query the value of the one token that there is, and is noted."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        states = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous()
        cached = (key.numel() + value.numel()) // key.shape[2]
        records.append(
            Attention(module, query.detach()[0, :, 0], key.detach()[:, :, 0], cached, states[0, 0])
        )
        return states, None

    mapping: dict[str, Any] = AttentionInterface._global_mapping
    kept = {name: mapping.get(name) for name in ("sdpa", "eager")}
    mapping.update(dict.fromkeys(kept, attend))
    try:
        yield
    finally:
        for name, function in kept.items():
            if function is None:
                del mapping[name]
            else:
                mapping[name] = function


def _seen(
    attention: Attention,
    before: Sequence[Call | Attention],
    after: Sequence[Call | Attention],
    names: dict[nn.Module, str],
) -> Place | None:
    """The block by the numbers of its queries and outputs."""
    heads, size = attention.query.shape
    output = next(
        (
            call.module
            for call in after
            if isinstance(call, Call)
            and call.inputs.numel() == attention.output.numel()
            and torch.equal(call.inputs.flatten(), attention.output.flatten())
        ),
        None,
    )
    for call in reversed(before):
        if isinstance(call, Attention) or output is None:
            break
        place = _layout(call.output.flatten(), attention.query)
        if place is not None:
            first, step = place
            return Place(
                names[call.module], names[output], heads, size, attention.output.shape[-1], first, step,
                attention.cached,
            )  # fmt: skip
    return None


def _layout(values: Tensor, query: Tensor) -> tuple[int, int] | None:
    """Where the heads' queries, (heads, size), or a multiple of them, stand in a matrix's output: at
    ``first + h * step``.
    """
    heads, size = query.shape
    parts, rest = divmod(values.numel(), heads * size)
    if parts and _proportional(values[: heads * size].view(heads, size), query):
        return 0, size
    if rest or not parts:
        return None
    side_by_side, interleaved = values.view(parts, heads, size), values.view(heads, parts, size)
    for part in range(parts):
        if _proportional(side_by_side[part], query):
            return part * heads * size, size
        if _proportional(interleaved[:, part], query):
            return part * size, parts * size
    return None


def _proportional(one: Tensor, other: Tensor) -> bool:
    """Whether one is a positive multiple of the other, as a yarn's scale of rotated queries is."""
    product, lengths = (one * other).sum(), one.norm() * other.norm()
    return bool(lengths > 0 and product > (1 - 1e-5) * lengths)


def _named(
    module: nn.Module, names: dict[nn.Module, str], attention: Attention | None, heads: int | None = None
) -> Place | None:
    """The block by the names of its matrices: both in ``module``, or the output's in the one around it."""
    children = dict(module.named_children())
    queries = [children[name] for name in QUERIES if _is_matrix(children.get(name))]
    around = names[module].rpartition(".")[0]
    by_name = {name: m for m, name in names.items()}
    called = [f"{place}.{name}" for place in (names[module], around) for name in OUTPUTS]
    outputs = [by_name[name] for name in called if _is_matrix(by_name.get(name))]
    if not queries or not outputs:
        return None
    given, taken = _width(queries[0], out=True), _width(outputs[0], out=False)
    if attention is not None:
        heads, value_size = len(attention.query), attention.output.shape[-1]
        if given != attention.query.numel() or taken != heads * value_size:
            return None
        cached = attention.cached
    else:
        if not heads or given != taken or given % heads:
            return None
        value_size, cached = taken // heads, given + taken
    return Place(
        names[queries[0]], names[outputs[0]], heads, given // heads, value_size, 0, given // heads, cached
    )


def _is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _width(module: Any, *, out: bool) -> int:
    shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return int(shape[0 if out else 1])
