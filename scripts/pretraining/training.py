"""The training loop."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from .checkpoints import first_progress, load_checkpoint, save_checkpoint, saved_progress
from .console import log
from .corpus import CONTEXT, prepare, window_batch
from .model import SIZES, batch_loss, bits_per_byte, build_model, compile_body, grow, sample
from .optimizers import Optimizers

PROMPTS = ("The old house stood", "This film is", "In the morning, the doctor")


def learning_rate(seen: float, total: float, peak: float, begun: float = 0, warmup: float = 0.3e6) -> float:
    """Linear warm-up over ``warmup`` tokens from ``begun`` on, constant, then linearly to zero over the last
    40 % of all.

    Until the fall begins nothing depends on ``total``, so the end may be moved on resuming.
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
    name = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        lines = description.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def train(arguments: argparse.Namespace) -> None:
    """Train to ``--tokens``, from the last checkpoint where there is one."""
    out: Path = arguments.out
    total = int(arguments.tokens)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision if arguments.precision != "auto" else faster_precision(device)
    data = arguments.data or out.parent / "data"
    tokenizer, tokens, held_out, size = prepare(arguments.corpus, data)
    log(
        f"{len(tokens):,} training and {len(held_out):,} validation tokens; "
        f"{size / len(held_out):.2f} bytes a token"
    )

    torch.manual_seed(arguments.seed)
    depth = SIZES[arguments.size]["num_hidden_layers"]
    saved = saved_progress(out)
    layers = depth // 2 if arguments.grow_at > 0 else depth
    state = saved or first_progress(arguments.begin, layers)
    model = build_model(arguments.size, tokenizer, state["layers"])
    if arguments.begin and saved is None:
        begun = LlamaForCausalLM.from_pretrained(arguments.begin)
        if begun.config.hidden_size != model.config.hidden_size:
            sys.exit(f"--begin: {arguments.begin} is not of size {arguments.size}")
        model.load_state_dict(begun.state_dict())
    model.to(device)
    optimizers = Optimizers(model, precision)
    load_checkpoint(out, model, optimizers)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters:,} parameters, {precision} on {device}, {state['tokens']:,} of {total:,} tokens seen")
    if arguments.compile:
        compile_body(model)

    started, smoothed, logged = time.perf_counter(), None, (time.perf_counter(), state["tokens"])
    last_saved = time.perf_counter()
    while state["tokens"] < total:
        if state["layers"] < depth and state["tokens"] >= arguments.grow_at * total:
            model, moments = grow(model, optimizers.state(), arguments.size, tokenizer)
            optimizers = Optimizers(model, precision)
            optimizers.restore(moments)
            state["layers"] = depth
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
        if finished or time.perf_counter() - last_saved > arguments.save_minutes * 60:
            state["seconds"] += time.perf_counter() - started
            model.eval()
            with torch.compiler.set_stance("force_eager"):  # their many shapes are not worth compiling
                figure = bits_per_byte(model, held_out, size, precision, None if finished else 200_000)
                text = sample(model, tokenizer, PROMPTS[len(state["validation"]) % len(PROMPTS)])
            state["validation"].append([state["tokens"], round(figure, 4)])
            log(f"validation {figure:.4f} bits per byte" + ("" if finished else " (quick)"))
            log("sample: " + text)
            model.train()
            started = time.perf_counter()
            state.update(precision=precision, machine=machine(device), peak_rate=arguments.learning_rate)
            state.update(batch_tokens=arguments.batch_tokens, seed=arguments.seed, planned=total)
            state.setdefault("grow_at", arguments.grow_at)
            save_checkpoint(out, model, optimizers, state)
            last_saved = time.perf_counter()
    log("done")
