"""A trained model as it stands in the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .checkpoints import PROGRESS, load_checkpoint, saved_progress
from .console import log
from .corpus import CONTEXT, VOCABULARY, prepare
from .model import SIZES, bits_per_byte, build_model
from .optimizers import Optimizers
from .training import learning_rate

RECORDED = ("tokens", "seconds", "precision", "seed", "batch_tokens")

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---
# builtin:{name}

A small English language model, so that generation works where no model hub can be reached. Llama
architecture, {parameters:,} parameters (width {hidden_size}, {num_hidden_layers} layers,
{num_attention_heads} heads, tied embeddings), context {context}, byte-level BPE tokenizer with {vocabulary:,}
entries, weights in {stored}.

| | |
|---|---|
| data | 190 million characters: public-domain English books, unlabelled IMDB film reviews |
| held out | 1 % of passages and reviews, by a hash of their text; their books' other passages may be seen |
| tokens seen | {tokens:,} ({passes:.2f} passes over {corpus_tokens:,} training tokens) |
| validation | **{figure:.3f} bits per byte** on {validation_bytes:,} bytes, in windows of {context} tokens |
| | {overlapping:.3f} if each token has at least half a window before it |
| optimiser | Muon (matrices), AdamW (embeddings, norms); rate up to {rate:.2g}, falling over the last 40 % |
| batch | {batch_tokens:,} tokens; {windows} |
| depth | {depth} |
{earlier}| precision | {precision} |
| machine, time | {machines}; {seconds:,.0f} s of training, shared with other work |
| seed | {seed} |

## Limits

It is a tiny model: it knows the rhythm of English prose, not facts. It has read old books and film reviews
(Maas et al. 2011), with their prejudices; it has seen no code, little dialogue and no other language, and was
not tuned to follow instructions. Use it to try methods, to test software and to compare training schemes; do
not put its text before people as information.

## Reproduce

```
{commands}
```

`--begin DIR` goes on from this folder's weights, where `training.json` says how far they had come.
{replanned}"""


def windows_seen(state: dict[str, Any]) -> str:
    """What share of the tokens came in windows of which length, in words."""
    total = sum(state["steps"].values())
    shares = [f"of {length} for {count / total:.0%}" for length, count in state["steps"].items()]
    return "windows " + ", ".join(shares) + " of the tokens"


def depth_seen(state: dict[str, Any]) -> str:
    """How many layers were trained when, in words."""
    if state["grown_at"] == 0:
        return "all layers from the start"
    return f"half the layers for the first {state['grown_at']:,} tokens, then each is doubled"


def highest_rate(state: dict[str, Any]) -> float:
    """The highest learning rate of the last part, which may begin when the rate already falls."""
    seen = range(state["begun"], state["tokens"], state["batch_tokens"])
    return max(learning_rate(n, state["planned"], state["peak_rate"], state["begun"]) for n in seen)


def parts_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a training that went on from exported weights, the last of them last."""
    return [*state.get("earlier", []), state]


def plans(state: dict[str, Any]) -> str:
    """A sentence for each time that the planned end was moved."""
    sentences = [
        f"\nUntil {seen:,} tokens, {planned:,} were planned: rate and windows may be others than those of "
        "the commands above.\n"
        for part in parts_of(state)
        for seen, planned in part.get("replanned", [])
    ]
    return "".join(sentences)


def commands(state: dict[str, Any]) -> str:
    """The commands that make the model again, one training and one export for each of its parts."""
    name = state["size"]
    script = f"python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size {name}"
    lines: list[str] = []
    for number, part in enumerate(parts_of(state), 1):
        first = (
            f"--grow-at {part['grow_at']}" if number == 1 else f"--begin build/{name}-{number - 1}-exported"
        )
        out = f"build/{name}-{number}"
        batch, precision = part["batch_tokens"], part["precision"]
        lines += [
            f"{script} --out {out} \\",
            f"    {first} --tokens {part['planned']} --learning-rate {part['peak_rate']} \\",
            f"    --batch-tokens {batch} --precision {precision} --seed {part['seed']}",
            f"{script} --out {out} --export {out}-exported",
        ]
    return "\n".join(lines)


def earlier_parts(state: dict[str, Any]) -> str:
    """A row for each earlier model whose weights training went on from."""
    return "".join(
        f"| earlier part | the first {part['tokens']:,} tokens, rate {part['peak_rate']}, falling; "
        "training then went on from the exported weights (`--begin`) |\n"
        for part in state.get("earlier", [])
    )


def export(arguments: argparse.Namespace) -> None:
    """Write the last checkpoint as a standard ``transformers`` folder with its model card."""
    data = arguments.data or arguments.out.parent / "data"
    tokenizer, tokens, held_out, size = prepare(arguments.corpus, data)
    model = build_model(arguments.size, tokenizer)
    state = saved_progress(arguments.out)
    if state is None:
        sys.exit(f"no checkpoint in {arguments.out}")
    if state["size"] != arguments.size:
        sys.exit(f"--size {arguments.size}: the model in {arguments.out} is of size {state['size']}")
    if state["layers"] < SIZES[arguments.size]["num_hidden_layers"]:
        sys.exit(f"the model in {arguments.out} has not grown to its full depth yet")
    load_checkpoint(arguments.out, model, Optimizers(model, "float32"))
    stored = torch.float16
    model = model.to(stored).float().eval()  # the figure is that of the shipped weights
    figure = bits_per_byte(model, held_out, size, "float32")
    overlapping = bits_per_byte(model, held_out, size, "float32", stride=CONTEXT // 2)
    folder: Path = arguments.export
    model.to(stored).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = CARD.format(
        name="lm" if arguments.size == "base" else "lm-small",
        parameters=sum(p.numel() for p in model.parameters()),
        context=CONTEXT,
        vocabulary=VOCABULARY,
        stored=str(stored).removeprefix("torch."),
        passes=state["tokens"] / len(tokens),
        corpus_tokens=len(tokens),
        windows=windows_seen(state),
        depth=depth_seen(state),
        earlier=earlier_parts(state),
        commands=commands(state),
        rate=highest_rate(state),
        machines="; ".join(dict.fromkeys(part["machine"] for part in parts_of(state))),
        replanned=plans(state),
        figure=figure,
        overlapping=overlapping,
        validation_bytes=size,
        **SIZES[arguments.size],
        **{name: state[name] for name in RECORDED},
    )
    (folder / "README.md").write_text(card)
    (folder / PROGRESS).write_text(json.dumps(state, indent=1) + "\n")
    log(f"{folder}: {figure:.4f} bits per byte, {overlapping:.4f} in overlapping windows")
