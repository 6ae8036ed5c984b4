"""Model cards: metadata that the hub reads, how the model was trained, and what is promised of privacy."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.files import read_json
from ..core.text import printable
from ..methods import Method
from ..models.configuration import HUB_NAMES
from ..recipe.recipe import Recipe

OWN_LICENCE = "apache-2.0"
"""Of the built-in base models."""

TASKS = {
    "classification": "text-classification",
    "generation": "text-generation",
    "chat": "text-generation",
    "preference": "text-generation",
    "retrieval": "feature-extraction",
}
"""The hub's names of tasks."""

METRICS = {"macro_f1": "f1", "token_f1": "f1", "rouge_l": "rouge"}
"""The hub's names of metrics, where they are others."""

ROLE = re.compile(r":\w+:`~?([^`]+)`")
DISCLOSES = re.compile(r"Discloses: (.+?)(?:\n\s*\n|\Z)", re.DOTALL)


def with_card(
    page: str, folder: Path, directory: Path, recipe: Recipe, summary: Mapping[str, Any], method: Method
) -> str:
    """A loading page as a model card: metadata before it, and sections after it.

    Args:
        page: how the model in ``folder`` is loaded.
        folder: the exported folder.
        directory: the run's directory.
        recipe: the run's recipe, whose local paths are not told.
        summary: ``summary.json``.
        method: the run's method, whose documentation says what leaves a client.
    """
    from huggingface_hub import ModelCardData

    hub_base = hub_name(recipe.model.base)
    data: Any = ModelCardData(
        base_model=hub_base,
        license=licence_of(recipe),
        library_name=_library(folder),
        pipeline_tag=TASKS[recipe.data.task],
        datasets=[recipe.data.source] if (public := hub_name(recipe.data.source)) else None,
        metrics=sorted({_metric(name) for name, _ in _metrics(summary)}) or None,
        tags=["fedcustom", "federated-learning", summary["method"].replace("_", "-")],
        model_name=f"{summary['method']} of {recipe.model.base.rpartition('/')[2]}",
        eval_results=_results(recipe, summary, public) or None,
    )
    parts = [_training(recipe, summary), _table(summary), _privacy(directory, recipe, summary, method)]
    return f"---\n{data.to_yaml()}\n---\n\n{page.rstrip()}\n\n" + "\n".join(parts)


def hub_name(name: str) -> str | None:
    """A model's or data set's name on the hub; None for folders, files and built-in ones without one.
    Recorded recipes have absolute paths.
    """
    if name.startswith("builtin:"):
        return HUB_NAMES.get(name)
    return None if Path(name).is_absolute() or Path(name).expanduser().exists() else name


def licence_of(recipe: Recipe) -> str | None:
    """The base model's licence by the hub's name, where it is known without a network: of a built-in model,
    or by the card in the model's folder or in the hub's cache.
    """
    base = recipe.model.base
    if base.startswith("builtin:"):
        return OWN_LICENCE
    from huggingface_hub import ModelCard, try_to_load_from_cache

    file = Path(base).expanduser() / "README.md"
    if hub_name(base) is not None:
        found = try_to_load_from_cache(base, "README.md", revision=recipe.model.revision)
        file = Path(found) if isinstance(found, str) else file
    if not file.is_file():
        return None
    try:
        licence = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except ValueError:  # no metadata, or none that can be read
        return None
    return licence if isinstance(licence, str) else None


def disclosure(method: Method) -> str:
    """What a method's clients send, in the words of its documentation; empty where it says nothing."""
    found = DISCLOSES.search(inspect.getdoc(type(method)) or "")
    if found is None:
        return ""
    text = ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", found[1]).replace("``", "`")
    return " ".join(text.split())


def _library(folder: Path) -> str | None:
    if (folder / "modules.json").exists():
        return "sentence-transformers"
    if (folder / "adapter_config.json").exists():
        return "peft"
    return "transformers"


def _metrics(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(value)) for name, value in summary["metrics"].items() if math.isfinite(value)]


def _metric(name: str) -> str:
    return METRICS.get(name, name)


def _results(recipe: Recipe, summary: Mapping[str, Any], public: str | None) -> list[Any]:
    """The metrics of the test split, as entries of the hub's ``model-index``."""
    from huggingface_hub import EvalResult

    named = public or (recipe.data.source if recipe.data.source.startswith("builtin:") else "private data")
    return [
        EvalResult(
            task_type=TASKS[recipe.data.task],
            dataset_type=public or "private",
            dataset_name=named,
            dataset_split="test",
            metric_type=_metric(name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in _metrics(summary)
    ]


def _training(recipe: Recipe, summary: Mapping[str, Any]) -> str:
    rows = sum(client["examples"] for client in summary["clients"].values())
    count = summary["client_count"]
    whose = f"{count} client{'s' * (count != 1)}"
    cohort = recipe.rounds.cohort(count)
    where = {
        "federated": f"by {whose}, {cohort} of them in a round; their data stayed with them",
        "centralised": f"with the data of {whose} in one place (the centralised baseline)",
        "local": f"by {whose}, each alone",
    }[summary["baseline"]]
    text = (
        f"## How it was trained\n\nMethod `{summary['method']}`, {summary['rounds']} rounds, {where}. Round "
        f"{summary['best_round']} was kept. {summary['trainable_parameters']:,} numbers were trained"
    )
    head = f" and {summary['head_parameters']:,} of the head" if summary["head_parameters"] else ""
    trained = f", on {rows:,} rows" if rows else ""
    return f"{text}{head}{trained}. Seed {summary['seed']}.\n"


def _table(summary: Mapping[str, Any]) -> str:
    before = summary.get("untuned", {})
    lines = [
        "## Results\n",
        "On the test split:\n",
        "| metric | this model | before training |",
        "|---|---|---|",
    ]
    for name, value in _metrics(summary):
        was = before.get(name)
        lines.append(f"| {name} | {value:.4g} | {'' if was is None else f'{was:.4g}'} |")
    return "\n".join(lines) + "\n"


def _privacy(directory: Path, recipe: Recipe, summary: Mapping[str, Any], method: Method) -> str:
    lines = ["## Privacy\n"]
    if summary["baseline"] == "federated":
        if said := disclosure(method):
            lines.append(f"What leaves a client: {said}\n")
        if recipe.secure_sum is not None and recipe.secure_sum.on:
            fits = recipe.training.fit_head_rounds
            what = "changes, and of what their head was fitted from," if fits else "changes,"
            lines.append(
                f"Secure sums: the server was shown the sum of the clients' {what} and no client's own.\n"
            )
    promise, file = summary.get("privacy"), directory / "privacy.json"
    if promise is None or not file.exists():
        return "\n".join(
            [*lines, "No differential privacy is promised: the model may repeat training data.\n"]
        )
    record = read_json(file)
    lines.append(
        f"Differential privacy of each {promise['unit']}: epsilon {promise['epsilon']:.4g}, delta "
        f"{promise['delta']:g}.\n"
    )
    if not promise["valid"]:
        lines.append("**Not valid**: everybody can compute the noise and subtract it.\n")
    for heading, texts in (
        ("It assumes", record["assumptions"]),
        ("It never covers", record["never_promised"]),
    ):
        lines.append(_listed(heading, texts))
    return "\n".join(lines)


def _listed(heading: str, texts: Sequence[str]) -> str:
    return "\n".join([f"{heading}:\n", *(f"- {printable(text, lines=False)}" for text in texts), ""])
