"""Merged exports: an adapter's weights in those of its base model, exactly, as a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import read_json
from ..data.examples import LearningTask
from ..federated.base_model import load_for
from ..methods.full.method import SHARD
from ..methods.prefix.memory_export import FILE as CODE
from ..methods.tuning.loading_page import loading_page
from ..methods.tuning.model_card import offline
from ..recipe.recipe import Recipe

ADAPTER = "adapter_config.json"


def merges(directory: Path, recipe: Recipe) -> bool:
    """Whether a run's model is an adapter that can be merged; False where it is a plain model already.

    Args:
        directory: the run's directory.
        recipe: its recipe.

    Raises:
        RunError: it can never be a plain model, and why.
    """
    model, said = directory / "model", f"{directory}: --merge:"
    if (model / CODE).exists():
        raise RunError(
            f"{said} attention slots are no part of any matrix of the base model; --as feed-forward distils "
            "them into a plain model"
        )
    if not (model / ADAPTER).exists():
        if not (model / "config.json").exists():
            raise RunError(f"{said} the method leaves the weights of {recipe.model.base} as they are")
        return False
    if recipe.model.quantization is not None:
        raise RunError(
            f"{said} the adapter was trained beside weights in {recipe.model.quantization}, and merged into "
            "exact ones it is not the trained model; load it beside them (README.md)"
        )
    kind = str(read_json(model / ADAPTER)["peft_type"])
    if kind not in ("LORA", "IA3"):
        raise RunError(
            f"{said} what was trained ({kind.replace('_', ' ').lower()}) stands beside the input, as tokens "
            "or keys and values, and is no weight; allowed: LoRA and IA3, and models that are whole already"
        )
    return True


def write_merged(directory: Path, recipe: Recipe, task: LearningTask, folder: Path) -> None:
    """Write the base model with a run's adapter in its weights, in float32, with tokenizer and page.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    from peft import PeftModel

    base = load_for(recipe, task, directory)
    base.model.float()  # frozen matrices may be stored in less
    wrapped: Any = PeftModel.from_pretrained(base.model, str(directory / "model"))
    model = wrapped.merge_and_unload(safe_merge=True)
    model.config.dtype = "float32"
    model.save_pretrained(folder, max_shard_size=SHARD)
    base.tokenizer.save_pretrained(folder)
    page = offline(loading_page(base, adapter=False), base)
    (folder / "README.md").write_text(page, encoding="utf-8")
