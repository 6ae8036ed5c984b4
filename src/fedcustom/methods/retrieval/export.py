"""Export of a sentence encoder as a ``sentence-transformers`` folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ...core.files import write_json

MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
"""Its parts by their folders: the mean of the last states, of length one."""


def write_modules(folder: Path, width: int) -> None:
    """Write the files that say how vectors of ``width`` numbers come of the encoder."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
        "pooling_mode_max_tokens": False,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")


def weights_digest(model: Any) -> str:
    """A hash of a model's weights."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
