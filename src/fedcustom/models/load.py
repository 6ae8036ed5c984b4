"""Loading of pretrained base models and their tokenizers."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..core.errors import ModelError
from ..data.chat_template import ChatTemplate
from ..data.encode import TokenRules
from ..data.examples import LearningTask
from .configuration import load_configuration, loading_errors, locate, pooling_of
from .first_token import first_token_only
from .kernels import attend_in_float32_on_processors, fuse_activations
from .last_token import last_token_only
from .loading_report import LoadingReport, load_reported
from .output import OutputLayer, output_layer
from .padding import Padding, padding_of
from .pooled_classifier import PooledClassifier, with_pooling
from .precision import Precision, faster, step_seconds
from .quantised_layers import Quantised, quantise
from .quiet import quiet
from .settings import ModelSettings
from .size_class import Architecture, architecture_of
from .stored_weights import holds_halves, settle, stored_half, widen
from .tokenizer_check import check_tokenizer, token_rules

FEW = (8, 64)
"""Rows and tokens of a batch where nobody says more of it."""


@dataclass(frozen=True)
class Base:
    """A pretrained model with everything that is needed to customise it.

    ``head`` names the top-level modules that a classification task adds and trains (none for generation).
    ``precision`` is that of forward and backward passes; trained numbers are always kept in float32.
    ``measured`` are the seconds of a step in each precision by which it was chosen, where it was. With
    ``compile`` whoever trains the model compiles it first. ``output`` is a causal language model's output
    layer, where that is a plain matrix. ``padding`` is how texts of unlike lengths share a batch. ``loading``
    says which weights the checkpoint at ``revision`` lacked, ``quantised`` what of the model is. A model that
    spans several ``devices`` takes its inputs on the first of them, ``device``.
    """

    model: Any
    tokenizer: Any
    architecture: Architecture
    task: LearningTask
    name: str
    path: str
    head: tuple[str, ...]
    precision: Precision
    device: torch.device
    measured: Mapping[Precision, float] = field(default_factory=dict)
    compile: bool = False
    output: OutputLayer | None = None
    padding: Padding = "right"
    loading: LoadingReport = field(default_factory=LoadingReport)
    revision: str | None = None
    quantised: Quantised | None = None
    devices: tuple[torch.device, ...] = ()

    @property
    def spans(self) -> bool:
        """Whether the model's layers lie on several devices."""
        return len(self.devices) > 1

    @property
    def sequence_to_sequence(self) -> bool:
        """Whether prompts go to an encoder and targets to a decoder of their own."""
        return self.architecture == "encoder-decoder" and self.task.kind == "generation"

    @cached_property
    def token_rules(self) -> TokenRules:
        """What the model asks of the tokens of each text."""
        return token_rules(self.tokenizer, self.model.config, self.name, classifies=bool(self.head))

    @cached_property
    def chat(self) -> ChatTemplate | None:
        """The template of conversations, where the task is to answer in them."""
        return ChatTemplate(self.tokenizer, self.name) if self.task.chat else None

    @property
    def stops(self) -> list[int]:
        """The tokens by which a generated text ends: the tokenizer's end token; in conversations also the one
        that ends an answer, and those of the model's generation configuration.
        """
        if self.chat is None:
            return [self.tokenizer.eos_token_id]
        configured = self.model.generation_config.eos_token_id
        others = configured if isinstance(configured, list) else [configured]
        found = {self.tokenizer.eos_token_id, self.chat.end, *others} - {None}
        return sorted(int(token) for token in found)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward passes run."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def load_base(
    settings: ModelSettings,
    task: LearningTask,
    seed: int,
    *,
    head: bool = True,
    precision: Precision | None = None,
    batch: tuple[int, int] = FEW,
) -> Base:
    """Load tokenizer and model once; a classification head is initialised from ``seed``, the same everywhere.

    Without ``head`` the model is as it was pretrained, whatever the task: a language model, or the body of an
    encoder. With ``model.dtype = "auto"``, ``precision`` is that in which a run was begun; None: the faster
    for batches of so many rows and tokens (:mod:`.precision`).

    Raises:
        ModelError: the model cannot be loaded or does not fit the task.
    """
    import transformers

    configuration = load_configuration(settings)
    architecture = architecture_of(configuration)
    if task.kind == "generation" and architecture == "encoder":
        raise ModelError(
            f"model.base: {settings.base} is an encoder and cannot generate; data.task must be classification"
        )
    if task.chat and architecture != "decoder" and (not task.preference or task.chat_template is not None):
        raise ModelError(
            f"model.base: {settings.base} is an {architecture}; conversations (data.task = 'chat') need a "
            "causal language model"
        )
    classifies = head and task.kind == "classification"
    pooling = pooling_of(settings) if classifies else None
    device = choose_device(settings.device)
    if settings.compile and device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ModelError("model.compile = true: needs a C++ compiler (g++); this machine has none")
    path = locate(settings.base)
    common = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    attention = {} if settings.attention in (None, "auto") else {"attn_implementation": settings.attention}
    if settings.attention == "flash_attention_2":
        check_flash_attention(device, settings.dtype)
    with loading_errors(settings.base), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **common)
        if not head and architecture == "encoder":
            loader: Any = transformers.AutoModel
        elif classifies:
            loader = transformers.AutoModelForSequenceClassification
            configuration.num_labels = len(task.labels)
            configuration.id2label = dict(enumerate(task.labels))
            configuration.label2id = {label: number for number, label in enumerate(task.labels)}
            configuration.problem_type = "single_label_classification"
            if pooling is not None:
                loader = PooledClassifier
                with_pooling(configuration, pooling.name, normalize=pooling.normalize)
        elif architecture == "encoder-decoder":
            loader = transformers.AutoModelForSeq2SeqLM
        else:
            loader = transformers.AutoModelForCausalLM
        if task.chat_template is not None:
            tokenizer.chat_template = task.chat_template
        task = _read_as_texts(task, tokenizer, architecture, settings.base)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        check_tokenizer(tokenizer, configuration, architecture, task, head=head, name=settings.base)
        if configuration.pad_token_id is None:
            configuration.pad_token_id = tokenizer.pad_token_id
    placed = {} if settings.device_map is None else {"device_map": settings.device_map}
    plain_code = not (classifies or settings.compile or settings.trust_remote_code)
    with loading_errors(settings.base):
        stored = stored_half(path, settings.revision) if plain_code and settings.dtype != "auto" else None

    def read(kind: torch.dtype, **placed: Any) -> tuple[Any, LoadingReport]:
        with loading_errors(settings.base), quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, found = load_reported(
                loader, path, settings.base, head_modules if classifies else None,
                config=copy.deepcopy(configuration), dtype=kind, **attention, **common, **placed,
            )  # fmt: skip
        fuse_activations(model)
        model.eval()
        return model, found

    def load(**placed: Any) -> tuple[Any, LoadingReport]:
        """The model with its matrices of 16 bits as they are stored, and all else in float32."""
        if stored is not None:
            model, found = read(stored, **placed)
            if not found.initialised and not holds_halves(model.buffers()):  # else they would be rounded
                widen(model, matrices=False)
                return model, found
            del model
        return read(torch.float32, **placed)

    def exact() -> Any:
        model, _ = load()
        settle(model, settings.dtype)
        return model

    model, loading = load(**placed)
    tokenizer.padding_side = "right"
    if hasattr(model, "generation_config"):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    attend_in_float32_on_processors()
    devices = devices_of(model) if settings.device_map else (device,)
    if settings.device_map:
        device = model.get_input_embeddings().weight.device
    else:
        model.to(device)
    quantised = None
    if settings.quantization is not None:
        head_of = head_modules(model) if classifies else ()
        quantised = quantise(model, settings.quantization, head_of, exact, base=settings.base)
    settle(model, settings.dtype)
    reads_first = pooling is None or pooling.name in ("first", "pooler")
    if architecture == "encoder" and classifies and reads_first and not settings.compile:
        first_token_only(model)
    if architecture == "decoder" and classifies and not (settings.compile or settings.device_map):
        last_token_only(model)
    plain = architecture == "decoder" and task.kind == "generation" and not settings.compile
    measured: dict[Precision, float] = {}
    if settings.dtype != "auto":
        precision = settings.dtype
    elif precision is None:
        measured = step_seconds(model, device, *batch)
        precision = faster(measured)
    base = Base(
        model=model,
        tokenizer=tokenizer,
        architecture=architecture,
        task=task,
        name=settings.base,
        path=path,
        head=head_modules(model) if classifies else (),
        precision=precision,
        device=device,
        measured=measured,
        compile=settings.compile,
        output=output_layer(model) if plain else None,
        loading=loading,
        revision=settings.revision,
        quantised=quantised,
        devices=devices,
    )
    if task.chat:  # also where a model is exported whole: it has to stop by itself
        model.generation_config.eos_token_id = base.stops
    return replace(base, padding=padding_of(base, classifies=classifies))


def has_chat_template(settings: ModelSettings) -> bool:
    """Whether the model's tokenizer brings a template of conversations.

    Raises:
        ModelError: the tokenizer cannot be loaded.
    """
    import transformers

    with loading_errors(settings.base), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            locate(settings.base), revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    return bool(tokenizer.chat_template)


def _read_as_texts(task: LearningTask, tokenizer: Any, architecture: Architecture, name: str) -> LearningTask:
    """The task; one of preferences without conversations where the model has no template of them.

    Raises:
        ModelError: the recipe sets a system message, which plain texts do not have.
    """
    if not task.preference or (architecture == "decoder" and tokenizer.chat_template):
        return task
    if task.system is not None:
        raise ModelError(
            f"data.system: {name} has no chat template, so that prompts are plain texts without a system "
            "message; leave it unset, or name a Jinja file in data.chat_template"
        )
    return replace(task, chat=False)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The top-level modules with weights that are not the pretrained body."""
    body = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, module in model.named_children()
        if name != body and any(True for _ in module.parameters())
    )


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices of a model's parameters, in the order in which they come.

    Raises:
        ModelError: some of them are on no device: accelerate keeps them in main memory or on disk.
    """
    found = tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))
    if any(device.type == "meta" for device in found):
        raise ModelError(
            "model.device_map = 'auto': the model does not fit onto this machine's GPUs, and some of its "
            "weights would stay off them; set model.dtype = 'bfloat16', or take a smaller model"
        )
    return found


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes a GPU where there is one.

    Raises:
        ModelError: the name is not a device's, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"model.device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def check_flash_attention(device: torch.device, dtype: str) -> None:
    """Refuse FlashAttention where it cannot run.

    Raises:
        ModelError: says what it needs.
    """
    said = "model.attention = 'flash_attention_2': needs "
    if device.type != "cuda":
        raise ModelError(f"{said}a GPU; this run trains on {device.type}; allowed: auto, sdpa, eager")
    if dtype != "bfloat16":
        raise ModelError(f"{said}model.dtype = 'bfloat16'")
    if importlib.util.find_spec("flash_attn") is None:
        raise ModelError(f"{said}the package flash-attn: pip install flash-attn")
