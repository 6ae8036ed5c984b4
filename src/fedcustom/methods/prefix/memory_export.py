"""Export of prefix memories: a model with wider feed-forward networks and, where it has attention slots, with
their code in the hub's convention.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ...core.errors import ModelError
from ...core.files import read_json, write_json, write_text
from ...models.load import Base
from ...models.pooled_classifier import FILE as POOLED_FILE
from ...models.pooled_classifier import PooledClassifier
from ..tuning.loading_page import auto_class, loading_page
from ..tuning.technique import TrainableModel
from ..tuning.widening import Widening
from . import attention_slots
from .attention_slots import SETTING, add_slots

FILE = "modeling_prefix_memory.py"
"""What the code is called that is saved beside a model with attention slots."""

MODEL_TYPE = "prefix-memory-"
"""Before a configuration's model type, so that no library takes the folder for a model without slots."""

ANCHOR = "from transformers.activations import ACT2FN\n"
"""The line of the slots' code beside which the saved code imports the model's class."""

CONFIG = """

class PrefixMemoryConfig({config}):
    '''The configuration of a model with attention slots.'''

    model_type = "{type}"
{init}"""

POOLED_INIT = """
    def __init__(self, *arguments, **values):  # else transformers makes one that passes the parent's by
        super().__init__(*arguments, **values)
"""

MODEL = """

class PrefixMemory{kind}({kind}):
    '''{kind} with attention slots.'''

    config_class = PrefixMemoryConfig

    def __init__(self, config, *arguments, **options):
        super().__init__(config, *arguments, **options)
        add_slots(self, getattr(self.config, SETTING))
"""


def require_library_code(base: Base) -> None:
    """Refuse attention slots in a model whose code is not that of ``transformers``.

    Raises:
        ModelError: names what can be used in its place.
    """
    if not isinstance(base.model, PooledClassifier) and not _from_library(type(base.model)):
        raise ModelError(
            f"method.kind = 'memory' does not fit {base.name}: it has code of its own, beside which slots "
            "cannot be exported; use method.slots = 0 (feed-forward slots alone) or method.kind = 'kv'"
        )


def _from_library(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def export_with_code(
    trainable: TrainableModel, base: Base, memory: dict[str, Any] | None, widening: Widening | None
) -> None:
    """Let ``trainable`` save and load a whole model with the slots that ``memory`` describes as
    :func:`~.attention_slots.add_slots` takes it, and with wider networks.

    Without attention slots the folder is a plain model. With them it asks for ``trust_remote_code=True``.
    """
    model, save_plain = base.model, trainable.save

    def save(folder: Path) -> None:
        with widening.merged() if widening else contextlib.nullcontext():
            if memory is None:
                save_plain(folder)
                return
            setattr(model.config, SETTING, memory)
            try:
                save_plain(folder)
            finally:
                delattr(model.config, SETTING)
        _add_code(base, folder)

    def load(folder: Path) -> None:
        if memory is not None:
            _check_written(folder, memory)
        saved = _loaded(type(model), folder, slots=memory is not None)
        if widening:
            widening.take(saved, folder, "feed_forward_slots")
        weights = saved.state_dict()
        with torch.no_grad():
            for name, parameter in trainable.parameters.items():
                if ".adapter." not in name:
                    parameter.copy_(weights[name])

    trainable.save, trainable.load = save, load


def _check_written(folder: Path, memory: dict[str, Any]) -> None:
    """See that a folder's slots shift queries as the recipe's do, and stand beside the same blocks; memories
    once had no shifts.
    """
    config = read_json(folder / "config.json")
    if SETTING not in config:  # a pooled classifier's folder holds its encoder's configuration
        config = config.get("encoder", {})
    saved = config.get(SETTING, {})
    written = saved.get("shifts", False)
    if written != memory["shifts"]:
        raise ModelError(
            f"{folder}: was written with method.query_shifts = {str(written).lower()}; set that in the recipe"
        )
    blocks, own = ({place["query"] for place in each.get("places", ())} for each in (saved, memory))
    if blocks != own:
        raise ModelError(
            f"{folder}: has slots beside {len(blocks)} attention blocks, and the recipe beside {len(own)}: "
            "it was written with another method.first_layer; set that in the recipe"
        )


def _loaded(kind: Any, folder: Path, *, slots: bool) -> Any:
    """The model in a folder, with its slots."""
    if not slots:
        return kind.from_pretrained(folder, dtype=torch.float32)

    class WithSlots(kind):  # type: ignore[misc]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            add_slots(self, getattr(self.config, SETTING))

    values = read_json(folder / "config.json")
    values["model_type"] = values["model_type"].removeprefix(MODEL_TYPE)
    config = kind.config_class.from_dict(values)
    return WithSlots.from_pretrained(folder, config=config, dtype=torch.float32)


def _add_code(base: Base, folder: Path) -> None:
    """Write the slots' code, have the configuration name it, and say in the page how to load it."""
    kind, module = type(base.model), FILE.removesuffix(".py")
    values = read_json(folder / "config.json")
    code = Path(attention_slots.__file__).read_text(encoding="utf-8")
    pooled, config = isinstance(base.model, PooledClassifier), kind.config_class.__name__
    values["model_type"] = MODEL_TYPE + values["model_type"]
    values["auto_map"] = {"AutoConfig": f"{module}.PrefixMemoryConfig"}
    names = f"{config}, {kind.__name__}"
    if pooled:
        imports = f"{ANCHOR}\nfrom .{POOLED_FILE.removesuffix('.py')} import {names}\n"
    else:
        imports = f"from transformers import {names}\n{ANCHOR}"
    init = POOLED_INIT if pooled else ""
    code += CONFIG.format(config=config, type=values["model_type"], init=init)
    code += MODEL.format(kind=kind.__name__)
    values["auto_map"][auto_class(base)] = f"{module}.PrefixMemory{kind.__name__}"
    values["architectures"] = [f"PrefixMemory{kind.__name__}"]
    write_json(folder / "config.json", values)
    write_text(folder / FILE, code.replace(ANCHOR, imports))
    write_text(folder / "README.md", loading_page(base, adapter=False, code=FILE))
