"""Pretrain the small language models that ship as ``builtin:lm`` and ``builtin:lm-small``.

The corpus is a JSON-lines file (``.xz`` allowed) with one ``{"text": ...}`` a line. One per cent of the
documents, chosen by a hash of their text, is held out: neither the tokenizer nor the model sees it, and bits
per byte are measured on it. Documents are packed end to end, each closed by the end-of-text token, and cut
into windows.

    python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size base --out build/pretrain/base
    python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size small --out build/pretrain/small

A run that was stopped goes on from its last checkpoint when the same command is given again. ``--export DIR``
writes the model in 16-bit safetensors with its tokenizer and its model card, as it stands in the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
VOCABULARY = 8192
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
LAYER = re.compile(r"\.layers\.(\d+)\.")
PROMPTS = ("The old house stood", "This film is", "In the morning, the doctor")

SIZES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2},
}


# --- corpus and tokenizer ---


def documents(corpus: Path) -> Iterator[str]:
    """The texts of a JSON-lines corpus, one after the other."""
    opener = lzma.open if corpus.suffix == ".xz" else open
    with opener(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out one per cent (by its content, so that order does not
    matter).
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 == 0


def train_tokenizer(corpus: Path, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 8,192 entries, trained on the training documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text in documents(corpus) if not is_held_out(text)), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return wrapped


def prepare(corpus: Path, folder: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray, int]:
    """Tokenizer, training tokens, validation tokens (uint16, memory-mapped) and the validation text's
    bytes.
    """
    done = folder / "prepared.json"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log(f"training the tokenizer on {corpus.name}")
        tokenizer = train_tokenizer(corpus, folder / "tokenizer")
        end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        streams: dict[bool, list[np.ndarray]] = {False: [], True: []}
        sizes = {False: 0, True: 0}
        log("tokenising")
        batch: list[str] = []

        def flush() -> None:
            for text, encoding in zip(batch, tokenizer.backend_tokenizer.encode_batch(batch), strict=True):
                held_out = is_held_out(text)
                streams[held_out].append(np.array([*encoding.ids, end], dtype=np.uint16))
                sizes[held_out] += len(text.encode())
            batch.clear()

        for text in documents(corpus):
            batch.append(text)
            if len(batch) == 1000:
                flush()
        flush()
        # Documents of one book stand side by side in the corpus; a fixed shuffle spreads them.
        order = np.random.default_rng(0).permutation(len(streams[False]))
        np.save(folder / "train.npy", np.concatenate([streams[False][i] for i in order]))
        np.save(folder / "validation.npy", np.concatenate(streams[True]))
        counts = {"train_bytes": sizes[False], "validation_bytes": sizes[True]}
        done.write_text(json.dumps(counts))
    counts = json.loads(done.read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    train = np.load(folder / "train.npy", mmap_mode="r")
    validation = np.load(folder / "validation.npy", mmap_mode="r")
    return tokenizer, train, validation, counts["validation_bytes"]


def window_batch(tokens: np.ndarray, step: int, batch: int, length: int, seed: int) -> Tensor:
    """The ``step``-th batch of windows, ``(batch, length + 1)``: a pure function of its arguments.

    Each pass over the corpus cuts it into windows at a random offset and visits all of them once in random
    order, so that a resumed run sees exactly what an uninterrupted one would.
    """
    windows = (len(tokens) - length - 1) // length
    steps_per_pass = windows // batch
    passes, within = divmod(step, steps_per_pass)
    generator = np.random.default_rng([seed, passes, length])
    offset = int(generator.integers(length))
    chosen = generator.permutation(windows)[within * batch : (within + 1) * batch]
    starts = [min(offset + int(i) * length, len(tokens) - length - 1) for i in chosen]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


# --- loss ---


def softmax_loss_(logits: Tensor, target: Tensor) -> Tensor:
    """The summed cross-entropy of float32 logits ``(rows, vocabulary)``, which become its gradient in place;
    ``target`` is ``(rows, 1)``.
    """
    wanted, peak = logits.gather(1, target), logits.amax(1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(1, keepdim=True)
    logits.div_(total).scatter_add_(1, target, torch.full_like(wanted, -1.0))
    return (peak + total.log() - wanted).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a tied output layer without holding all logits at once.

    Forward computes loss and gradients together in chunks of rows, so that the (rows, vocabulary) matrix
    never exists: at 8,192 entries it would be 130 MB for 4,096 tokens, and its page faults cost more than the
    products.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, chunk: int = 512) -> Tensor:
        rows = hidden.shape[0]
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight.t())
        buffer = hidden.new_empty(min(chunk, rows), weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, rows, chunk):
            part, wanted = hidden[start : start + chunk], target[start : start + chunk, None]
            logits = torch.mm(part, weight.t(), out=buffer[: len(part)]).float()
            total += softmax_loss_(logits, wanted)
            gradient = logits.to(hidden.dtype)
            torch.mm(gradient, weight, out=grad_hidden[start : start + chunk])
            grad_weight.addmm_(part.t(), gradient)
        ctx.save_for_backward(grad_hidden, grad_weight.t())
        ctx.rows = rows
        return total / rows

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = outputs[0] / ctx.rows
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_weight * scale.to(grad_weight.dtype)).contiguous(),
            None,
            None,
        )


def batch_loss(model: LlamaForCausalLM, windows: Tensor, precision: str, first: int = 0) -> Tensor:
    """Mean loss per token in nats of windows ``(batch, length + 1)``, but for each window's first targets."""
    device_type = windows.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bfloat16"):
        hidden = model.model(windows[:, :-1]).last_hidden_state
    target = windows[:, 1 + first :].reshape(-1)
    hidden, weight = hidden[:, first:].reshape(-1, hidden.shape[-1]), model.lm_head.weight
    if precision == "bfloat16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    loss: Tensor = ChunkedCrossEntropy.apply(hidden, weight, target, 512 if device_type == "cpu" else 8192)
    return loss


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM,
    tokens: np.ndarray,
    size: int,
    precision: str,
    limit: int | None = None,
    stride: int = CONTEXT,
) -> float:
    """Bits per byte of the held-out text, in windows of the full context, each ``stride`` tokens after the
    one before.

    Each token is scored once, in the first window that has it. With a stride of the context that gives the
    first tokens of a window little context; with half of it every token has half a window at least, at twice
    the time. The end-of-text tokens count as cost but not as bytes. ``limit`` scores only that many tokens
    (and takes the bytes in proportion) for a quick look.
    """
    device = model.lm_head.weight.device
    count = min(len(tokens) - 1, limit or len(tokens))
    groups: dict[tuple[int, int], list[int]] = {}
    for start in range(0, count, stride):
        begin, end = max(0, start + stride - CONTEXT), min(start + stride, count)
        groups.setdefault((end - begin, start - begin), []).append(begin)
    total = 0.0
    for (length, first), begins in groups.items():
        for i in range(0, len(begins), 16):
            rows = [torch.from_numpy(tokens[b : b + length + 1].astype(np.int64)) for b in begins[i : i + 16]]
            loss = batch_loss(model, torch.stack(rows).to(device), precision, first).item()
            total += loss * len(rows) * (length - first)
    return total / math.log(2) / (size * count / (len(tokens) - 1))


# --- optimiser ---


def orthogonalised(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """Nearly the closest orthogonal matrix to each of ``(count, rows, columns)``, rows <= columns.

    Five steps of the quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024 (Muon), in
    ``precision``.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025).

    For hidden matrices. Matrices of one shape are orthogonalised in one batch, in ``precision``:
    ``torch.optim.Muon`` always goes through bfloat16, which is slow on most CPUs.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        momentum: float,
        weight_decay: float,
        precision: torch.dtype,
    ) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update: w = (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonalised(momentum)."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, members in shapes.items():
                wanted = []
                for p in members:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(velocity, group["momentum"])
                    wanted.append(ahead if p.shape[0] <= p.shape[1] else ahead.T)
                directions = orthogonalised(torch.stack(wanted), self.precision)
                rate = group["lr"] * 0.2 * math.sqrt(shape[1])
                for p, direction in zip(members, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction if p.shape[0] <= p.shape[1] else direction.T, alpha=-rate)


class Optimizers:
    """Muon for the hidden matrices, AdamW for embeddings and norms, as one."""

    def __init__(self, model: LlamaForCausalLM, precision: str) -> None:
        self.named = dict(model.named_parameters())
        hidden = [p for name, p in self.named.items() if p.dim() == 2 and "embed" not in name]
        embeddings = [p for name, p in self.named.items() if "embed" in name]
        vectors = [p for p in self.named.values() if p.dim() == 1]
        self.muon = Muon(hidden, momentum=0.95, weight_decay=0.1, precision=getattr(torch, precision))
        groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float) -> None:
        """One step of both at a learning rate; gradients are set to zero afterwards."""
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def state(self) -> dict[str, Tensor]:
        """Moments as named tensors."""
        found = {**self.muon.state, **self.adamw.state}
        return {
            f"{kind}/{name}": value.contiguous()
            for name, p in self.named.items()
            for kind, value in found[p].items()
        }

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        for key, value in moments.items():
            kind, name = key.split("/", maxsplit=1)
            parameter = self.named[name]
            owner = self.muon if kind == "velocity" else self.adamw
            owner.state[parameter][kind] = value.to("cpu" if kind == "step" else parameter.device)


# --- checkpoints ---


def save_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: Optimizers, state: dict) -> None:
    """Write weights, moments and progress so that a kill at any moment leaves the old or the new
    checkpoint whole.
    """
    fresh, current, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    named = dict(model.named_parameters())
    save_file({name: p.detach().contiguous() for name, p in named.items()}, fresh / "model.safetensors")
    save_file(optimizers.state(), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    fresh.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def saved_progress(folder: Path) -> dict | None:
    """Progress of the last whole checkpoint, or None where there is none."""
    source = _last_checkpoint(folder)
    if source is None:
        return None
    state: dict = json.loads((source / "state.json").read_text())
    return state


def load_checkpoint(folder: Path, model: LlamaForCausalLM, optimizers: Optimizers) -> None:
    """Put weights and moments of the last whole checkpoint back in place, where there is one."""
    source = _last_checkpoint(folder)
    if source is None:
        return
    weights = load_file(source / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    optimizers.restore(load_file(source / "optimizer.safetensors"))


def _last_checkpoint(folder: Path) -> Path | None:
    names = ("checkpoint", "checkpoint.old")
    return next((folder / n for n in names if (folder / n / "state.json").exists()), None)


# --- training ---


def log(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


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


def learning_rate(seen: float, total: float, peak: float, warmup: float = 0.3e6) -> float:
    """Linear warm-up over ``warmup`` tokens, constant, then linearly to zero over the last 40 %.

    Until the fall begins nothing depends on ``total``, so the end may be moved on resuming.
    """
    return peak * min(1.0, (seen + 1) / warmup, max(0.01, (total - seen) / (0.4 * total)))


def build_model(size: str, tokenizer: PreTrainedTokenizerFast, layers: int | None = None) -> LlamaForCausalLM:
    """A freshly initialised Llama of the named size, or with other ``layers``."""
    shape = {**SIZES[size], "num_hidden_layers": layers or SIZES[size]["num_hidden_layers"]}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    model = LlamaForCausalLM(config)
    # Residual branches start smaller with depth (GPT-2), which lets a small batch take a high rate.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


@torch.no_grad()
def grow(
    shallow: LlamaForCausalLM, moments: dict[str, Tensor], size: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """The model of the named size from one of half its layers, and the moments of the old layers' weights.

    Each layer is followed by a copy of itself whose output projections are zero: the function stays what it
    was (as in Wu et al. 2024, LLaMA Pro), and half the depth for the first tokens costs half the products of
    the body (progressive stacking, Gong et al. 2019; Du et al. 2024).
    """
    deep = build_model(size, tokenizer).to(shallow.device)
    old = dict(shallow.named_parameters())
    for name, parameter in deep.named_parameters():
        source = name
        if match := LAYER.search(name):
            source = LAYER.sub(f".layers.{int(match[1]) // 2}.", name)
            if int(match[1]) % 2 and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
                continue
        parameter.copy_(old[source])
    renamed = {LAYER.sub(lambda m: f".layers.{2 * int(m[1])}.", name): v for name, v in moments.items()}
    return deep, renamed


def window_length(seen: float, total: float) -> int:
    """Tokens in a window after ``seen`` tokens. Short windows first: the same tokens cost less attention; the
    last fifth teaches the full context.
    """
    return CONTEXT // 4 if seen < 0.4 * total else CONTEXT // 2 if seen < 0.8 * total else CONTEXT


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Forty greedy tokens after ``prompt`` with a mild repetition penalty."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2, use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(output[0])


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
    state = saved_progress(out) or {
        "tokens": 0,
        "seconds": 0.0,
        "steps": {},
        "validation": [],
        "layers": depth // 2 if arguments.grow_at > 0 else depth,
    }
    model = build_model(arguments.size, tokenizer, state["layers"]).to(device)
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
        rate = learning_rate(state["tokens"], total, arguments.learning_rate)
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
            state.update(grow_at=arguments.grow_at)
            save_checkpoint(out, model, optimizers, state)
            last_saved = time.perf_counter()
    log("done")


def compile_body(model: LlamaForCausalLM) -> None:
    """Compile all but the output layer."""
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # fused by the compiler, faster than the flash kernel there
    model.model.compile()


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


# --- export ---

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
| held out | 1 % of the documents, chosen by a hash of their text; not seen by tokenizer or model |
| tokens seen | {tokens:,} ({passes:.2f} passes over {corpus_tokens:,} training tokens) |
| validation | **{figure:.3f} bits per byte** on {validation_bytes:,} bytes, in windows of {context} tokens |
| | {overlapping:.3f} if each token has at least half a window before it |
| optimiser | Muon (matrices), AdamW (embeddings, norms); rate {peak_rate}, falling over the last 40 % |
| batch | {batch_tokens:,} tokens; windows of 256 for the first 80 % of the tokens, then 512 |
| precision | {precision} |
| machine, time | {machine}; {seconds:,.0f} s of training, shared with other work |
| seed | {seed} |

## Limits

It is a tiny model: it knows the rhythm of English prose, not facts. It has read old books and film reviews
(Maas et al. 2011), with their prejudices; it has seen no code, little dialogue and no other language, and was
not tuned to follow instructions. Use it to try methods, to test software and to compare training schemes; do
not put its text before people as information.

## Reproduce

```
python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size {size} --tokens {planned} --out build/{size}
python scripts/pretrain_lm.py --corpus corpus.jsonl.xz --size {size} --out build/{size} --export DIR
```
"""


def export(arguments: argparse.Namespace) -> None:
    """Write the last checkpoint as a standard ``transformers`` folder with its model card."""
    data = arguments.data or arguments.out.parent / "data"
    tokenizer, tokens, held_out, size = prepare(arguments.corpus, data)
    model = build_model(arguments.size, tokenizer)
    state = saved_progress(arguments.out)
    if state is None:
        sys.exit(f"no checkpoint in {arguments.out}")
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
        size=arguments.size,
        parameters=sum(p.numel() for p in model.parameters()),
        context=CONTEXT,
        vocabulary=VOCABULARY,
        stored=str(stored).removeprefix("torch."),
        passes=state["tokens"] / len(tokens),
        corpus_tokens=len(tokens),
        figure=figure,
        overlapping=overlapping,
        validation_bytes=size,
        **SIZES[arguments.size],
        **{k: state[k] for k in (
            "tokens", "seconds", "precision", "machine", "seed", "planned", "batch_tokens", "peak_rate")},
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    log(f"{folder}: {figure:.4f} bits per byte, {overlapping:.4f} in overlapping windows")


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
        "--tokens", type=float, default=60e6, help="tokens to train on; may be changed on resuming"
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
    torch.set_num_threads(arguments.threads)
    if arguments.export:
        export(arguments)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
