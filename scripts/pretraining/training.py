"""The training loop."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .checkpoints import (
    check_options,
    first_progress,
    load_checkpoint,
    save_checkpoint,
    save_progress,
    saved_progress,
)
from .console import interruption, log
from .corpus import CONTEXT, prepare, window_batch
from .model import SIZES, batch_loss, bits_per_byte, build_model, compile_body, grow, sample
from .optimizers import Optimizers

QUICK = 200_000
"""Held-out tokens of a validation on the way; the last one has all of them."""

PROMPTS = ("The old house stood", "This film is", "In the morning, the doctor")


def learning_rate(seen: float, total: float, peak: float, begun: float = 0, warmup: float = 0.3e6) -> float:
    """Linear warm-up over ``warmup`` tokens from ``begun`` on, constant, then falling linearly to a hundredth
    over the last 40 % of all tokens.
    """
    return peak * min(1.0, (seen - begun + 1) / warmup, max(0.01, (total - seen) / (0.4 * total)))


def window_length(seen: float, total: float) -> int:
    """Tokens in a window after ``seen`` tokens. Short windows first: the same tokens cost less attention; the
    last fifth teaches the full context.
    """
    return CONTEXT // 4 if seen < 0.4 * total else CONTEXT // 2 if seen < 0.8 * total else CONTEXT


def faster_precision(device: str) -> str:
    """``bfloat16`` where its matrix products are faster than float32's on this machine, else ``float32``."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(1024, 256, device=device, dtype=dtype) for _ in range(2))
        (a @ b.t()).sum().item()
        start = time.perf_counter()
        for _ in range(5):
            (a @ b.t()).sum().item()
        seconds[dtype] = time.perf_counter() - start
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"


def machine(device: str) -> str:
    """What the model was trained on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    description = Path("/proc/cpuinfo")
    if description.exists():
        lines = description.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {threads} of {os.cpu_count()} cores"


def begin_or_resume(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, device: str
) -> tuple[LlamaForCausalLM, Optimizers, dict[str, Any]]:
    """Model, optimisers and progress: those of the last checkpoint, else of ``--begin``, else new ones.

    Raises:
        SystemExit: they do not go with the options.
    """
    out, begin = arguments.out, arguments.begin
    saved = saved_progress(out)
    precision = arguments.precision
    if precision == "auto":
        precision = (saved or {}).get("precision") or faster_precision(device)
    options = {key: getattr(arguments, key) for key in ("size", "batch_tokens", "grow_at", "seed")}
    options |= {"peak_rate": arguments.learning_rate, "precision": precision}
    total, depth = int(arguments.tokens), SIZES[arguments.size]["num_hidden_layers"]
    if saved is not None:
        check_options(saved, options, out)
        state = saved
        log(f"going on from the checkpoint in {out}")
        if total != state["planned"]:
            log(f"now {total:,} tokens in all, and no more {state['planned']:,}")
            state["replanned"].append([state["tokens"], state["planned"]])
    else:
        state = first_progress(begin, depth // 2 if arguments.grow_at > 0 else depth)
        state |= {**options, "replanned": []}
        state.setdefault("grown_at", None if state["layers"] < depth else 0)
    state["planned"] = total
    if total <= state["tokens"] and saved is None:
        sys.exit(f"--tokens {total}: {begin} has seen {state['tokens']:,} tokens already; give more, in all")
    torch.manual_seed(arguments.seed)
    model = build_model(arguments.size, tokenizer, state["layers"])
    if begin and saved is None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(begin).state_dict())
    model.to(device)
    optimizers = Optimizers(model, precision)
    load_checkpoint(out, model, optimizers)
    return model, optimizers, state


def check_begin(begin: Path, size: str) -> None:
    """Refuse to begin with a model of another size.

    Raises:
        SystemExit: it is.
    """
    width = json.loads((begin / "config.json").read_text())["hidden_size"]
    if width != SIZES[size]["hidden_size"]:
        sys.exit(f"--begin: {begin} is not of size {size}")


def train(arguments: argparse.Namespace) -> None:
    """Train to ``--tokens``, from the last checkpoint where there is one."""
    out: Path = arguments.out
    total = int(arguments.tokens)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.begin:
        check_begin(arguments.begin, arguments.size)
    data = arguments.data or out.parent / "data"
    tokenizer, tokens, held_out, size = prepare(arguments.corpus, data)
    log(
        f"{len(tokens):,} training and {len(held_out):,} validation tokens; "
        f"{size / len(held_out):.2f} bytes a token"
    )
    if arguments.begin:
        known = PreTrainedTokenizerFast.from_pretrained(arguments.begin)
        if known.get_vocab() != tokenizer.get_vocab():
            sys.exit(f"--begin: the tokenizer of {arguments.begin} is not that of {data}")
    model, optimizers, state = begin_or_resume(arguments, tokenizer, device)
    precision, depth = state["precision"], SIZES[arguments.size]["num_hidden_layers"]
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters:,} parameters, {precision} on {device}, {state['tokens']:,} of {total:,} tokens seen")
    if arguments.compile:
        compile_body(model)

    started, smoothed, logged = time.perf_counter(), None, (time.perf_counter(), state["tokens"])
    last_saved = time.perf_counter()
    with interruption() as stop:
        while state["tokens"] < total and not stop.is_set():
            if state["layers"] < depth and state["tokens"] >= arguments.grow_at * total:
                model, moments = grow(model, optimizers.state(), arguments.size, tokenizer)
                optimizers = Optimizers(model, precision)
                optimizers.restore(moments)
                state.update(layers=depth, grown_at=state["tokens"])
                log(f"grown to {depth} layers, {sum(p.numel() for p in model.parameters()):,} parameters")
                if arguments.compile:
                    compile_body(model)
            length = window_length(state["tokens"], total)
            rows = arguments.batch_tokens // length
            step = state["steps"].get(str(length), 0)
            windows = window_batch(tokens, step, rows, length, arguments.seed).to(device)
            rate = learning_rate(state["tokens"], total, arguments.learning_rate, state["begun"])
            loss = batch_loss(model, windows, precision)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(rate)
            state["steps"][str(length)] = step + 1
            state["tokens"] += rows * length
            count = sum(state["steps"].values())
            if count % 50 == 0:
                value = loss.item()
                smoothed = value if smoothed is None else 0.8 * smoothed + 0.2 * value
                now = time.perf_counter()
                speed = (state["tokens"] - logged[1]) / (now - logged[0])
                logged = (now, state["tokens"])
                left = (total - state["tokens"]) / speed / 60
                log(
                    f"{state['tokens'] / 1e6:8.2f} M tokens  loss {smoothed:.3f}  lr {rate:.2e}  "
                    f"{speed:,.0f} tokens/s  {left:.0f} min left"
                )
            finished = state["tokens"] >= total
            due = time.perf_counter() - last_saved > arguments.save_minutes * 60
            if finished or due or stop.is_set():
                state["seconds"] += time.perf_counter() - started
                state["machine"] = machine(device)
                save_checkpoint(out, model, optimizers, state)
                if finished or due:
                    limit = None if finished else QUICK
                    with torch.compiler.set_stance("force_eager"):  # their shapes are not worth compiling
                        figure = bits_per_byte(model, held_out, size, precision, limit)
                        text = sample(model, tokenizer, PROMPTS[len(state["validation"]) % len(PROMPTS)])
                    scored = min(limit or len(held_out), len(held_out) - 1)
                    state["validation"].append([state["tokens"], round(figure, 4), scored])
                    save_progress(out, state)
                    log(f"validation {figure:.4f} bits per byte" + ("" if finished else " (quick)"))
                    log("sample: " + text)
                started = last_saved = time.perf_counter()
    if state["tokens"] < total:
        log("stopped; the same command goes on from here")
        sys.exit(130)
    log("done")
