"""A small byte-level tokenizer, for tests and for the scripts that make random models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
"""Special tokens, in the order of their ids."""


def byte_level_tokenizer(texts: Sequence[str], *, ends: bool = False) -> Any:
    """A byte-level BPE tokenizer of up to 400 tokens, trained on ``texts``; it ends a text with the end token
    if ``ends``, as those of T5 and BART do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if ends:
        end = (SPECIAL[2], 2)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    pad, begin, stop, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=begin,
        eos_token=stop,
        unk_token=unknown,
        model_max_length=64,
    )
