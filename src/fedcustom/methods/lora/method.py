"""Low-rank adaptation (Hu et al. 2021) and its federated variants."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...aggregation.lora_factors import (
    LoraFactors,
    frozen_bases,
    layer_layout,
    orthonormal_rows,
    pad_rank,
)
from ...core.errors import ModelError
from ...core.tensors import Tensors
from ...models.load import Base
from ..full.method import SHARD
from ..tuning.loading_page import loading_page
from ..tuning.peft_support import (
    attach_peft,
    clean_name,
    ending_in,
    peft_tuned,
    task_type,
    upper,
)
from ..tuning.technique import TrainableModel
from .aggregation_hooks import LoraAggregation
from .matrix import Matrix
from .settings import CHANGES_BASE, MIXED_RANKS, LoraSettings


class Lora:
    """LoRA; ``variant`` says what travels and how it is merged (see :mod:`.aggregation_hooks`).

    A of (rank, in) starts at the same random values for every client, in ``fedsvd`` with orthonormal rows; B
    of (out, rank) at zero.
    """

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Wrap the chosen matrices with PEFT's LoRA layers."""
        from peft import LoraConfig

        settings = self.settings
        # PEFT's own choice is named, since it refuses to make it for some mixtures of experts.
        chosen: Any = settings.target_modules or usual_targets(base) or "all-linear"
        if chosen == ["all-linear"]:
            chosen = "all-linear"
        if settings.first_layer:
            chosen = sorted(upper(base, _matrices(base, chosen), settings.first_layer))
        # A private adapter is further rows of A and columns of B, at the scale of the shared ones.
        rank = settings.rank + settings.private_rank
        alpha = settings.alpha * settings.scale(settings.rank) / settings.scale(rank)
        config = LoraConfig(
            task_type=task_type(base),
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            use_rslora=settings.rank_stabilised,
            use_dora=settings.dora,
            target_modules=chosen,
            modules_to_save=list(base.head) or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = attach_peft(base, config, "lora")
        layers = lora_layers(model)
        _check_layers(layers, settings, base)
        if settings.variant == "ffa":
            for layer in layers.values():
                layer.lora_A["default"].weight.requires_grad_(False)
        elif settings.variant == "fedsb":
            for layer in layers.values():
                _train_between(layer, settings.rank)
        elif settings.variant == "fedsvd":
            for layer in layers.values():
                inner = layer.lora_A["default"].weight
                inner.data.copy_(orthonormal_rows(inner.detach()))
        trainable = peft_tuned(base, model)
        if settings.variant == "fedsb":
            trainable.parameters = {
                n.replace(".lora_B.", ".lora_R."): p for n, p in trainable.parameters.items()
            }
        matrices = [
            Matrix(
                name,
                layer.lora_A["default"].weight.detach()[: settings.rank].clone().cpu(),
                _outer(layer).detach()[:, : settings.rank].clone().cpu(),
            )
            for name, layer in layers.items()
        ]
        trainable.hooks = LoraAggregation(settings, matrices, seed)
        if settings.variant in (*MIXED_RANKS, *CHANGES_BASE):
            _fit_ranks(trainable, model, layers, matrices, settings, base)
        if settings.variant == "fedsb":
            _save_as_lora(trainable, layers)
        if settings.private_rank:
            _split_private(trainable, matrices, settings.rank)
        trainable.matrices = {
            n: 1 for n, p in trainable.parameters.items() if p.dim() == 2 and n not in trainable.head
        }
        if settings.dropout:
            trainable.active_dropout = [
                m for name, m in model.named_modules() if name.endswith("lora_dropout")
            ]
        return trainable


def usual_targets(base: Base) -> list[str] | str:
    """PEFT's choice of matrices for this type of model, names or a pattern; empty where it has none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    chosen = CHOICES.get(base.model.config.model_type, [])
    return chosen if isinstance(chosen, str) else list(chosen)


def _matrices(base: Base, chosen: list[str] | str) -> set[str]:
    """The names of the matrices that PEFT would adapt: by their endings, or by a pattern."""
    if not isinstance(chosen, str):
        return ending_in(base.model, [f".{name}" for name in chosen])
    every = ending_in(base.model, [""])
    return every if chosen == "all-linear" else {name for name in every if re.fullmatch(chosen, name)}


def lora_layers(model: Any) -> dict[str, Any]:
    """The adapted layers, by their names in the base model's terms."""
    from peft.tuners.lora import LoraLayer

    return {clean_name(n): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def _check_layers(layers: dict[str, Any], settings: LoraSettings, base: Base) -> None:
    for name, layer in layers.items():
        if "default" not in layer.lora_A:
            raise ModelError(
                f"method.target_modules: {name} of {base.name} is an embedding; name matrices that are not"
            )
        sides = layer.lora_A["default"].weight.shape[1], layer.lora_B["default"].weight.shape[0]
        if settings.variant == "fedsb" and settings.rank > min(sides):
            raise ModelError(
                f"method.rank = {settings.rank}: variant fedsb allows at most {min(sides)} for {name}"
            )


def _split_private(trainable: TrainableModel, matrices: list[Matrix], rank: int) -> None:
    """Give the rows of A and columns of B beyond ``rank`` names of their own (two adapters, as in FedDPA,
    Yang et al. 2024).
    """

    def read(tensors: Tensors) -> Tensors:
        for matrix in matrices:
            own_a, own_b = matrix.private_names
            a, b = tensors[matrix.a_name], tensors[matrix.b_name]
            tensors |= {own_a: a[rank:].clone(), own_b: b[:, rank:].contiguous()}
            tensors |= {matrix.a_name: a[:rank].clone(), matrix.b_name: b[:, :rank].contiguous()}
        return tensors

    def write(tensors: Tensors) -> Tensors:
        for matrix in matrices:
            own_a, own_b = matrix.private_names
            tensors[matrix.a_name] = torch.cat([tensors[matrix.a_name], tensors.pop(own_a)])
            tensors[matrix.b_name] = torch.cat([tensors[matrix.b_name], tensors.pop(own_b)], dim=1)
        return tensors

    trainable.read_hook, trainable.write_hook = read, write


class InnerProduct(nn.Module):
    """Fed-SB: ``B R`` in the place of B; only R of (rank, rank) is trained, and it starts at zero."""

    def __init__(self, outer: Tensor) -> None:
        super().__init__()
        self.outer = nn.Parameter(outer, requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(outer.shape[1], outer.shape[1], device=outer.device))

    def product(self) -> Tensor:
        """``B R`` of (out, rank)."""
        return self.outer @ self.weight

    def forward(self, inner: Tensor) -> Tensor:
        """(..., rank) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(inner, self.weight), self.outer)


def _train_between(layer: Any, rank: int) -> None:
    """Fix A and B to the base weight's leading singular directions, and train R between them."""
    weight = layer_layout(layer.get_base_layer().weight.detach(), layer.fan_in_fan_out).float()
    b, a = frozen_bases(weight, rank)
    inner = layer.lora_A["default"].weight
    inner.requires_grad_(False)
    with torch.no_grad():
        inner.copy_(a)
    layer.lora_B["default"] = InnerProduct(b.to(inner.device))


def _outer(layer: Any) -> Tensor:
    outer = layer.lora_B["default"]
    weight: Tensor = outer.outer if isinstance(outer, InnerProduct) else outer.weight
    return weight


def _fit_ranks(
    trainable: TrainableModel,
    model: Any,
    layers: dict[str, Any],
    matrices: list[Matrix],
    settings: LoraSettings,
    base: Base,
) -> None:
    """Let the resident model take factors of any rank up to its own, and a changed base.

    Missing rows of A and columns of B are zero, and stay so under any gradient: the product has none there.
    """
    rank = settings.rank
    changes_base = settings.variant in CHANGES_BASE
    original: Tensors = {}
    applied: Tensors = {}
    if changes_base:
        original = {m.name: layers[m.name].get_base_layer().weight.detach().clone() for m in matrices}
        applied = {m.base_name: torch.zeros(m.b.shape[0], m.a.shape[1]) for m in matrices}

    def write(tensors: Tensors) -> Tensors:
        nonlocal rank
        for matrix in matrices:
            layer = layers[matrix.name]
            rank = tensors[matrix.a_name].shape[0]
            layer.scaling["default"] = settings.scale(rank)
            padded = pad_rank(LoraFactors(tensors[matrix.a_name], tensors[matrix.b_name]), settings.rank)
            tensors[matrix.a_name], tensors[matrix.b_name] = padded.a, padded.b
            change = tensors.pop(matrix.base_name, None)
            if change is not None and change is not applied[matrix.base_name]:
                weight = layer.get_base_layer().weight
                whole = original[matrix.name] + layer_layout(change, layer.fan_in_fan_out).to(weight.device)
                weight.copy_(whole)
                applied[matrix.base_name] = change
        return tensors

    def read(tensors: Tensors) -> Tensors:
        for matrix in matrices:
            tensors[matrix.a_name] = tensors[matrix.a_name][:rank]
            tensors[matrix.b_name] = tensors[matrix.b_name][:, :rank].contiguous()
        return {**tensors, **applied}

    trainable.write_hook, trainable.read_hook = write, read
    trainable.scale = lambda tensors: settings.scale(tensors[matrices[0].a_name].shape[0])
    trainable.scaled = frozenset(matrix.a_name for matrix in matrices)
    if not changes_base:
        return

    def save(folder: Path) -> None:
        exact = copy.deepcopy(model).float()  # frozen matrices may be stored in less
        for matrix, layer in zip(matrices, lora_layers(exact).values(), strict=True):
            change = layer_layout(applied[matrix.base_name], layer.fan_in_fan_out)
            whole = original[matrix.name].float() + change.to(original[matrix.name].device)
            layer.get_base_layer().weight.data.copy_(whole)
        merged = exact.merge_and_unload()
        merged.config.dtype = torch.float32
        merged.save_pretrained(folder, max_shard_size=SHARD)
        (folder / "README.md").write_text(loading_page(base, adapter=False), encoding="utf-8")

    def load(folder: Path) -> None:
        saved = type(base.model).from_pretrained(folder, dtype=torch.float32).state_dict()
        state = {m.a_name: m.a for m in matrices} | {m.b_name: torch.zeros_like(m.b) for m in matrices}
        for matrix in matrices:
            change = saved[f"{matrix.name}.weight"] - original[matrix.name].float()
            state[matrix.base_name] = layer_layout(change, layers[matrix.name].fan_in_fan_out).contiguous()
        trainable.write(state | {name: saved[name] for name in trainable.head})

    trainable.save, trainable.load = save, load


def _save_as_lora(trainable: TrainableModel, layers: dict[str, Any]) -> None:
    """Fed-SB is saved as an ordinary LoRA adapter whose B is ``B R``."""
    save_adapter = trainable.save

    def save(folder: Path) -> None:
        trained = {name: layer.lora_B["default"] for name, layer in layers.items()}
        for name, layer in layers.items():
            plain = nn.Linear(trained[name].weight.shape[0], trained[name].outer.shape[0], bias=False)
            plain.weight.data = trained[name].product().detach()
            layer.lora_B["default"] = plain
        try:
            save_adapter(folder)
        finally:
            for name, layer in layers.items():
                layer.lora_B["default"] = trained[name]

    def load(folder: Path) -> None:
        import peft

        saved = peft.load_peft_weights(str(folder), device="cpu")
        state = {}
        for name, layer in layers.items():
            product = saved[f"base_model.model.{name}.lora_B.weight"]
            state[f"{name}.lora_R.weight"] = layer.lora_B["default"].outer.T.cpu() @ product
        heads = {clean_name(name): tensor for name, tensor in saved.items()}
        trainable.write(state | {name: heads[name] for name in trainable.head})

    trainable.save, trainable.load = save, load
