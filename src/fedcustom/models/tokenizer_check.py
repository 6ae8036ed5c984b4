"""Checks of a tokenizer against its model's configuration, before any weight is loaded."""

from __future__ import annotations

from typing import Any

from ..core.errors import ModelError
from ..core.library_errors import in_one_line
from ..data.encode import TokenRules
from ..data.examples import LearningTask
from .size_class import Architecture

CLASSIFY_BY_END = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
"""Types of encoder-decoders that classify a text by the state of its end token."""

SHIFT_TARGETS = {"bart", "encoder-decoder", "led", "longt5", "mt5", "mvp", "t5", "umt5"}
"""Types of encoder-decoders whose targets begin with the configuration's start token."""

WORD = "a"
"""A text of which every tokenizer makes some token."""


def embedding_count(configuration: Any) -> int | None:
    """How many tokens the embedding of a model's inputs has; None where its configuration does not say."""
    encoder = getattr(configuration, "encoder", None)
    reads = encoder if hasattr(encoder, "vocab_size") else configuration.get_text_config()
    size = getattr(reads, "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def token_rules(tokenizer: Any, configuration: Any, name: str, *, classifies: bool) -> TokenRules:
    """What a model asks of the tokens of each text."""
    embeddings = embedding_count(configuration)
    fits = embeddings is None or len(tokenizer) <= embeddings
    by_end = classifies and configuration.model_type in CLASSIFY_BY_END
    single = configuration.eos_token_id if by_end else None
    return TokenRules(None if fits else embeddings, single, name)


def check_tokenizer(
    tokenizer: Any,
    configuration: Any,
    architecture: Architecture,
    task: LearningTask,
    *,
    head: bool,
    name: str,
) -> None:
    """Refuse a tokenizer that does not go with its model or lacks what the task needs. ``head``: whether the
    model gets a classification head, where the task is classification.

    Raises:
        ModelError: names the model, the token and what to do.
    """
    where = f"model.base: the tokenizer of {name}"
    writes = task.kind == "generation" or (architecture == "encoder-decoder" and not head)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{where} has neither a padding nor an end token")
    if writes and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{where} has no end token (eos_token), by which a generated text ends; set it in the model's "
            "tokenizer_config.json"
        )
    # A classifier on an encoder-decoder gives its decoder the text, behind the start token.
    shifts = (writes or head) and configuration.model_type in SHIFT_TARGETS
    if shifts and getattr(configuration, "decoder_start_token_id", None) is None:
        raise ModelError(
            f"model.base: the configuration of {name} has no decoder_start_token_id, with which a "
            "decoder's text begins; set it in the model's config.json"
        )
    try:
        ids: list[int] = tokenizer(WORD)["input_ids"]
    except Exception as error:  # whatever a tokenizer raises, it is of no use
        raise ModelError(f"{where} fails on the text {WORD!r}: {in_one_line(error)}") from error
    _check_size(tokenizer, configuration, where, ids, writes=writes)
    if head and task.kind == "classification" and configuration.model_type in CLASSIFY_BY_END:
        _check_end(tokenizer, configuration, where, ids)


def _check_size(tokenizer: Any, configuration: Any, where: str, ids: list[int], *, writes: bool) -> None:
    """Refuse a tokenizer whose tokens the model's embedding lacks. A few added tokens may be too many, as
    long as no text holds one (:class:`~..data.encode.TokenRules`): Gemma has such.
    """
    size, padding = embedding_count(configuration), getattr(configuration, "pad_token_id", None)
    if size is not None and isinstance(padding, int) and padding >= size:
        raise ModelError(
            f"{where.replace('tokenizer', 'configuration')} has pad_token_id = {padding}, but the model has "
            f"embeddings of {size} tokens"
        )
    if size is None or len(tokenizer) <= size:
        return
    if tokenizer.vocab_size > size:
        raise ModelError(
            f"{where} has {tokenizer.vocab_size} tokens, but the model has embeddings of {size}: they do not "
            "belong together"
        )
    used = {"padding token": tokenizer.pad_token_id, "end token": tokenizer.eos_token_id if writes else None}
    used |= {"special token": max(ids, default=0)}
    for kind, token in used.items():
        if token is not None and token >= size:
            raise ModelError(
                f"{where} has the {kind} {tokenizer.convert_ids_to_tokens(token)!r} as number {token}, but "
                f"the model has embeddings of {size} tokens; resize them (resize_token_embeddings), or name "
                "another token in tokenizer_config.json"
            )


def _check_end(tokenizer: Any, configuration: Any, where: str, ids: list[int]) -> None:
    """Refuse a tokenizer that does not end each text with the one token by which the model classifies."""
    end = configuration.eos_token_id
    if end is None:
        raise ModelError(
            f"{where.replace('tokenizer', 'configuration')} has no eos_token_id, by which it classifies"
        )
    if ids.count(end) != 1:
        token = tokenizer.convert_ids_to_tokens(end) if end < len(tokenizer) else None
        raise ModelError(
            f"{where} ends a text with {ids.count(end)} end tokens (number {end}, {token!r}); the model "
            "classifies a text by the one that its tokenizer must add"
        )
