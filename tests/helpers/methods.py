"""Methods that train tensors, on tiny models: every setting that is tested, and examples to train on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from fedcustom.aggregation.settings import AggregationSettings
from fedcustom.data.examples import ClientData, Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods import Client, Context, WeightTuning, build_method, registry
from fedcustom.methods.lora.settings import Variant
from fedcustom.methods.tuning.summed_head import SumTerms
from fedcustom.methods.tuning.technique import Keeps
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.privacy.example_mechanism import ExamplePrivacy
from fedcustom.training.settings import TrainingSettings
from helpers.rows import make_rows

LABELS = ("animal", "food", "place")

RATE = 0.01
"""The learning rate that :func:`make` sets unless told otherwise."""

TECHNIQUES = [name for name, registered in registry.methods().items() if registered.is_technique]
"""The methods that train tensors."""

MODELS = {"bert": "classification", "llama": "generation", "gpt2": "generation", "bart": "generation"}
"""The tiny models, with the task that each is trained for."""

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"width": 6},
    "ia3": {},
    "bitfit": {"norms": True},
    "ln_tuning": {},
    "prefix": {"length": 4, "kind": "kv"},
    "prefix matched": {"length": 4, "kind": "kv", "merging": "matched"},
    "prefix stacked": {"length": 4, "kind": "kv", "merging": "stacked"},
    "prefix reparametrised": {"length": 4, "kind": "kv", "reparametrise": True},
    "prefix memory": {"length": 8, "kind": "memory"},
    "prefix memory matched": {"length": 8, "kind": "memory", "merging": "matched"},
    "prefix memory stacked": {"length": 8, "kind": "memory", "merging": "stacked"},
    "prefix memory alternate": {"length": 8, "kind": "memory", "merging": "alternate"},
    "prefix shifts": {"length": 12, "kind": "memory", "query_shifts": True},
    "prefix frozen": {"length": 8, "kind": "memory", "keys": "frozen", "linear": True},
    "soft_prompt": {"length": 4},
    "soft_prompt p-tuning": {"length": 4, "encoder": "mlp"},
    "soft_prompt lstm": {"length": 4, "encoder": "lstm"},
    "lora": {"rank": 4},
    "lora rslora": {"rank": 4, "rank_stabilised": True},
    "lora private": {"rank": 3, "private_rank": 2},
    "lora dora": {"rank": 4, "dora": True},
    **{
        f"lora {variant}": {"rank": 4, "variant": variant}
        for variant in get_args(Variant)
        if variant not in ("fedit", "fedask")
    },
    "lora fedask": {"rank": 4, "variant": "fedask", "oversampling": 4},
}
"""Every method and variant: the method's name is the first word; with the settings that make it small."""

ALONE = ("full", "prefix reparametrised", "soft_prompt p-tuning", "soft_prompt lstm", "lora dora")
"""What has each client's own copy of more than a few tensors, or a network that is trained with them."""

SINGLE = ("lora fedsb", "lora flora")
"""What makes float32 tensors of its own, whatever the model's are."""


def classification_examples(count: int = 8) -> list[Example]:
    return [Example(row["text"], label=LABELS.index(row["label"])) for row in make_rows(count, 3)]


def generation_examples(count: int = 8) -> list[Example]:
    return [Example(f"{row['source']} :", target=f" {row['target']}") for row in make_rows(count, 3)]


def preference_examples(count: int = 8) -> list[Example]:
    """Pairs whose rejected answer is that of the next example, and a word longer."""
    found = generation_examples(count)
    others = [*found[1:], found[0]]
    return [replace(e, rejected=f"{other.target} too") for e, other in zip(found, others, strict=True)]


def make(
    path: str,
    method: str,
    kind: str = "classification",
    /,
    *,
    training: dict[str, Any] | None = None,
    aggregation: AggregationSettings | None = None,
    clients: int = 1,
    keeps: Keeps = "nothing",
    model: dict[str, Any] | None = None,
    row_privacy: ExamplePrivacy | None = None,
    sum_terms: SumTerms | None = None,
    max_length: int = 24,
    **more: Any,
) -> WeightTuning:
    """A method with seed 0 on the model in the folder ``path``, for two rounds of ``clients``; ``more`` are
    its own settings, ``training`` and ``model`` replace those of training and of the model.
    """
    if method == "bitfit":
        more.setdefault("norms", True)  # some of the tiny models have no biases
    data = DataSettings(task=kind, max_length=max_length, max_target_length=16)  # type: ignore[arg-type]
    task = LearningTask.of(data, LABELS if kind == "classification" else ())
    base = load_base(ModelSettings(base=path, **(model or {})), task, seed=0)
    context = Context(
        base=base,
        data=data,
        training=TrainingSettings(
            **{"learning_rate": RATE, "batch_size": 4, "clip_norm": 0, **(training or {})}
        ),
        aggregation=aggregation or AggregationSettings(),
        evaluation=EvaluationSettings(max_new_tokens=8),
        rounds=2,
        seed=0,
        clients=clients,
        keeps=keeps,
        row_privacy=row_privacy,
        sums_only=sum_terms is not None,
        sum_terms=sum_terms or SumTerms(),
    )
    made = build_method(registry.settings_of(method)(**more), context)
    assert isinstance(made, WeightTuning)
    return made


def examples_for(kind: str) -> list[Example]:
    if kind == "preference":
        return preference_examples()
    return classification_examples() if kind == "classification" else generation_examples()


SKEWED: dict[str, list[int]] = {"a": [0], "b": [1, 2], "c": [0, 1, 2]}
"""Which labels each client has."""


def skewed() -> dict[str, Client]:
    """Clients with seven to nine examples of the labels in ``SKEWED``."""
    pool = classification_examples(60)
    return {
        name: Client(name, ClientData(name, [e for e in pool if e.label in labels][: 6 + len(labels)]))
        for name, labels in SKEWED.items()
    }
