"""The corpus: its texts, tokenizer, held-out part and windows."""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .console import log

CONTEXT = 512
VOCABULARY = 8192
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


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
    bytes; from ``folder`` where they were made before.

    Raises:
        SystemExit: they were made from another corpus.
    """
    done = folder / "prepared.json"
    with corpus.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
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
        # A fixed shuffle, whatever the order of the corpus.
        order = np.random.default_rng(0).permutation(len(streams[False]))
        np.save(folder / "train.npy", np.concatenate([streams[False][i] for i in order]))
        np.save(folder / "validation.npy", np.concatenate(streams[True]))
        made = {"corpus": digest, "train_bytes": sizes[False], "validation_bytes": sizes[True]}
        done.write_text(json.dumps(made))
    made = json.loads(done.read_text())
    if made.get("corpus") != digest:
        sys.exit(f"{folder} was made from another corpus than {corpus}; name another folder with --data")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    train = np.load(folder / "train.npy", mmap_mode="r")
    validation = np.load(folder / "validation.npy", mmap_mode="r")
    return tokenizer, train, validation, made["validation_bytes"]


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
