"""Train a tiny language model that can use demonstrations, to show federated in-context learning where no
larger model is at hand.

    python scripts/train_in_context.py --corpus corpus.jsonl.xz --out build/in-context-lm

As in MetaICL (Min et al. 2022), the model learns from episodes: a few texts with answers, then a text whose
answer is that of the text most like it. Texts are sentences of the corpus (JSON lines with a ``text``;
``.xz`` allowed), answers are random words that are drawn anew in each episode. So it can copy an answer from
its context and knows nothing of any task: without demonstrations it is at chance. Beside the episodes it sees
sequences of random tokens that stand there twice: on them the copying of what followed before (induction
heads, Olsson et al. 2022) is learnt in minutes, on episodes alone it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
END, PAD = "<|endoftext|>", "<|pad|>"
TEMPLATES = (
    ("Question: ", "\nThe answer is"),
    ("Review: ", "\nThis film is"),
    ("Text: ", "\nLabel:"),
    ("", " =>"),
)


def sentences(corpus: Path, count: int) -> list[str]:
    """Sentences of 5 to 12 words, at most twenty a document."""
    opener = lzma.open if corpus.suffix == ".xz" else open
    found: list[str] = []
    with opener(corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            parts = re.split(r"(?<=[.!?])\s+", " ".join(json.loads(line)["text"].split()))
            found += [part for part in parts if 5 <= len(part.split()) <= 12][:20]
            if len(found) >= count:
                break
    return found[:count]


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )


def episode(texts: list[str], words: list[str], generator: np.random.Generator) -> list[tuple[str, bool]]:
    """Pieces of one prompt, each with whether it is an answer that is to be learnt."""
    shown, kinds = int(generator.integers(1, 9)), int(generator.integers(2, 7))
    answers = [f" {' '.join(generator.choice(words, int(generator.integers(1, 3))))}" for _ in range(kinds)]
    labels = generator.integers(kinds, size=shown)
    demonstrations = [texts[i].split() for i in generator.integers(len(texts), size=shown)]
    # The query shares words with one demonstration, more likely a late one: the nearest stands last.
    odds = np.arange(1, shown + 1.0)
    target = int(generator.choice(shown, p=odds / odds.sum()))
    query = list(demonstrations[target])
    other = texts[int(generator.integers(len(texts)))].split()
    for place in range(len(query)):
        if generator.random() < 0.5:
            query[place] = other[place % len(other)]
    before, after = TEMPLATES[int(generator.integers(len(TEMPLATES)))]
    pieces: list[tuple[str, bool]] = []
    for words_, label in [*zip(demonstrations, labels, strict=True), (query, labels[target])]:
        pieces += [(f"{before}{' '.join(words_)}{after}", False), (answers[label], True), ("\n\n", False)]
    return pieces[:-1]


def batch_of(episodes: list[list[tuple[str, bool]]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and, where they are to be learnt, labels (elsewhere -100)."""
    flat = tokenizer([text for pieces in episodes for text, _ in pieces])["input_ids"]
    rows, marks, place = [], [], 0
    for pieces in episodes:
        ids, mark = [], []
        for _, learnt in pieces:
            ids += flat[place]
            mark += [learnt] * len(flat[place])
            place += 1
        rows.append(ids[-CONTEXT:])
        marks.append(mark[-CONTEXT:])
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for number, (row, mark) in enumerate(zip(rows, marks, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, : len(row)] = torch.where(torch.tensor(mark), torch.tensor(row), -100)
    return ids, labels


def repeated(
    count: int, vocabulary: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of random tokens that stand there twice; the second time, but for its first token, is to be
    learnt.
    """
    length = int(generator.integers(6, 24))
    once = torch.from_numpy(generator.integers(vocabulary, size=(count, length)))
    ids = torch.cat([once, once], dim=1)
    labels = ids.clone()
    labels[:, : length + 1] = -100
    return ids, labels


def answer_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tokens that are to be learnt."""
    states = model.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    chosen = wanted != -100
    return functional.cross_entropy(model.lm_head(states[chosen]), wanted[chosen])


def main() -> None:
    """Train, and write a ``transformers`` folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.corpus.is_file():
        parser.error(f"--corpus: no file {arguments.corpus}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    try:
        texts = sentences(arguments.corpus, 60_000)
    except (ValueError, KeyError, TypeError, AttributeError, lzma.LZMAError):
        parser.error(f"--corpus: {arguments.corpus} must hold JSON lines, each with a text under 'text'")
    if len(texts) < 100:
        parser.error(
            f"--corpus: {arguments.corpus} holds {len(texts)} sentences of 5 to 12 words; 100 at least"
        )
    tokenizer = make_tokenizer(texts, 4096)
    words = sorted({word.lower() for text in texts[:5000] for word in re.findall(r"[A-Za-z]{3,}", text)})
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
    begun, means = time.perf_counter(), [0.0, 0.0]
    with contextlib.suppress(KeyboardInterrupt):  # what was learnt until then is kept
        for step in range(1, arguments.steps + 1):
            spent = (time.perf_counter() - begun) / 60 / arguments.minutes
            share = max((step - 1) / arguments.steps, spent)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * min(1.0, step / 100, 2 * (1 - share))
            ids, labels = batch_of(
                [episode(texts, words, generator) for _ in range(arguments.batch)], tokenizer
            )
            loss = answer_loss(model, ids, labels)
            copied = answer_loss(model, *repeated(32, len(tokenizer), generator))
            (loss + copied).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            means = [
                new.item() if step == 1 else 0.98 * mean + 0.02 * new.item()
                for mean, new in zip(means, (loss, copied), strict=True)
            ]
            if step % 50 == 0:
                print(
                    f"step {step}: {means[0]:.3f} nats a token of answers, {means[1]:.3f} of repetitions, "
                    f"{spent * arguments.minutes:.1f} min",
                    flush=True,
                )
    model.eval().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
