"""The models, how one grows, and their losses."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import CONTEXT, VOCABULARY

LAYER = re.compile(r"\.layers\.(\d+)\.")

SIZES: dict[str, dict[str, int]] = {
    "base": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 2},
}


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


def compile_body(model: LlamaForCausalLM) -> None:
    """Compile all but the output layer."""
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # fused by the compiler, faster than the flash kernel there
    model.model.compile()


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Forty greedy tokens after ``prompt`` with a mild repetition penalty."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2, use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(output[0])


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
