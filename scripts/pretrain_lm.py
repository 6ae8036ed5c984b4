"""Pretrain the small language models that ship as ``builtin:lm`` and ``builtin:lm-small``.

The corpus is a JSON-lines file (``.xz`` allowed) with one ``{"text": ...}`` a line. One per cent of the
documents, chosen by a hash of their text, is held out: neither the tokenizer nor the model sees it, and bits
per byte are measured on it. Documents are packed end to end, each closed by the end-of-text token, and cut
into windows.

    python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size base --out build/pretrain/base
    python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size small --out build/pretrain/small

A run that was stopped, by Ctrl-C say, goes on when the same command is given again. ``--export DIR``
writes the model in 16-bit safetensors with its tokenizer and its model card, as it stands in the package.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from pretraining.checkpoints import PROGRESS
from pretraining.corpus import CONTEXT
from pretraining.export import export
from pretraining.model import SIZES
from pretraining.training import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="JSON lines with a text each (.xz allowed)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument(
        "--data", type=Path, help="folder for tokenizer and tokens (default: data beside --out)"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument(
        "--tokens",
        type=float,
        default=60e6,
        help="tokens to train on in all, those of --begin included; may be changed on resuming",
    )
    parser.add_argument(
        "--begin", type=Path, metavar="DIR", help="begin with the weights of an exported model, not at random"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument(
        "--grow-at",
        type=float,
        default=0.4,
        help="share of the tokens after which half the layers become all; 0: all from the start",
    )
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--compile", action="store_true", help="compile the model's body (worth it on long runs)"
    )
    parser.add_argument("--save-minutes", type=float, default=10, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, help="write the trained model to this folder and stop")
    arguments = parser.parse_args()
    if not arguments.corpus.is_file():
        parser.error(f"--corpus: no file {arguments.corpus}")
    for name in (PROGRESS, "config.json", "model.safetensors", "tokenizer.json") if arguments.begin else ():
        if not (arguments.begin / name).is_file():
            parser.error(f"--begin: {arguments.begin} is not a folder that --export wrote: no {name}")
    if not 0 <= arguments.grow_at < 1:
        parser.error(f"--grow-at {arguments.grow_at}: must be at least 0 and below 1")
    if arguments.batch_tokens < CONTEXT:
        parser.error(f"--batch-tokens {arguments.batch_tokens}: must be at least {CONTEXT}")
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
