"""A smaller model with another depth: the first layers of an encoder, saved as a model of its own.

    python scripts/first_layers.py builtin:minilm 3 build/minilm-3-layers

The folder can be named wherever a recipe names a base model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from fedcustom.models.configuration import locate


def main() -> None:
    """Load, drop the later layers, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="builtin:minilm, a local folder or a hub id of a BERT-like encoder")
    parser.add_argument("layers", type=int, help="how many layers to keep")
    parser.add_argument("out", type=Path, help="a new folder")
    arguments = parser.parse_args()
    path = locate(arguments.base)
    model = AutoModel.from_pretrained(path, num_hidden_layers=arguments.layers)
    model.save_pretrained(arguments.out)
    AutoTokenizer.from_pretrained(path).save_pretrained(arguments.out)
    print(f"{arguments.layers} layers, {model.num_parameters():,} numbers: {arguments.out}")


if __name__ == "__main__":
    main()
