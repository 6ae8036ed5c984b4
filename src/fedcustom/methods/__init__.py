"""Customisation methods, one package each, behind one protocol of five verbs.

A new method adds its line to :data:`TECHNIQUES`, or to :data:`OTHERS` if it does not train tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .adapter import Adapter, AdapterSettings
from .bitfit import BitFit, BitFitSettings
from .distillation import Distillation, DistillationSettings
from .full import Full, FullSettings
from .ia3 import Ia3, Ia3Settings
from .lora import Lora, LoraSettings
from .prefix import Prefix, PrefixSettings
from .probe import Probe, ProbeSettings
from .prompt_engineering import PromptEngineeringSettings, prompt_engineering
from .protocol import (
    UNFINISHED,
    Answer,
    Asked,
    AsksClients,
    Client,
    Memory,
    Method,
    ScalesLogits,
    State,
    Task,
    Update,
    peeked,
)
from .retrieval import Retrieval, RetrievalSettings
from .settings import MethodSettingsBase, TuningSettings
from .soft_prompt import SoftPrompt, SoftPromptSettings
from .tuning.head_fit import client_labels
from .tuning.method import WeightTuning
from .tuning.technique import Context, Technique

TECHNIQUES: dict[str, tuple[type[TuningSettings], type[Any]]] = {
    "prefix": (PrefixSettings, Prefix),
    "lora": (LoraSettings, Lora),
    "soft_prompt": (SoftPromptSettings, SoftPrompt),
    "full": (FullSettings, Full),
    "adapter": (AdapterSettings, Adapter),
    "ia3": (Ia3Settings, Ia3),
    "bitfit": (BitFitSettings, BitFit),
    "probe": (ProbeSettings, Probe),
}
"""Methods that train tensors: their settings, and which tensors those are."""

OTHERS: dict[str, tuple[type[MethodSettingsBase], Callable[[Any, Context], Method]]] = {
    "distillation": (DistillationSettings, Distillation),
    "retrieval": (RetrievalSettings, Retrieval),
    "prompt_engineering": (PromptEngineeringSettings, prompt_engineering),
}
"""Methods with verbs of their own: their settings, and what makes one of them."""

METHODS: dict[str, type[MethodSettingsBase]] = {
    name: settings for name, (settings, _) in [*TECHNIQUES.items(), *OTHERS.items()]
}
"""The settings of every method."""

MethodSettings = (
    PrefixSettings
    | LoraSettings
    | SoftPromptSettings
    | FullSettings
    | AdapterSettings
    | Ia3Settings
    | BitFitSettings
    | ProbeSettings
    | DistillationSettings
    | RetrievalSettings
    | PromptEngineeringSettings
)

__all__ = [
    "UNFINISHED",
    "Answer",
    "Asked",
    "AsksClients",
    "Client",
    "Context",
    "Memory",
    "Method",
    "MethodSettings",
    "ScalesLogits",
    "State",
    "Task",
    "Technique",
    "Update",
    "build_method",
    "client_labels",
    "peeked",
]


def build_method(settings: MethodSettings, context: Context) -> Method:
    """The method that a recipe names.

    Raises:
        ModelError: the method does not fit the base model.
    """
    if settings.name in OTHERS:
        return OTHERS[settings.name][1](settings, context)
    _, technique = TECHNIQUES[settings.name]
    return WeightTuning(technique(settings), context)
