"""Architectures beside those of the tiny models: trained together or alone, padded or not, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts.architectures.__main__ import BEGIN, END, general, read_table, write_table
from scripts.architectures.matrix import METHODS, Outcome, outcome, tasks_of
from scripts.architectures.models import ALL, ENCODERS, kind_of, write_model

from fedcustom.core.errors import ModelError
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.tokens import TokenizedExample, by_length
from fedcustom.evaluation.settings import EvaluationSettings
from fedcustom.methods import State
from fedcustom.methods.registry import check_padding
from fedcustom.methods.tuning.batching.client_modules import ClientNorm, gain_offset
from fedcustom.models.inference import predict
from fedcustom.models.load import load_base
from fedcustom.models.padding import find_padding
from fedcustom.models.settings import ModelSettings
from helpers.methods import make

TEXTS = ["the cat", "the old cat sees a small dog near the hill and then the house", "a dog likes soup"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of an architecture's tiny model, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> str:
        if not (folder / name).exists():
            write_model(name, folder / name)
        return str(folder / name)

    return path


CELLS = {
    ("bert", "lora", "classification"): "together",
    ("xlnet", "adapter", "classification"): "alone",
    ("longformer", "bitfit", "classification"): "alone",
    ("fnet", "ln_tuning", "classification"): "together",
    ("distilbert", "soft_prompt", "classification"): "together",
    ("gemma", "bitfit", "generation"): "together",
    ("gemma2", "prefix", "generation"): "together",
    ("falcon", "prefix", "generation"): "together",
    ("gpt_neox", "prefix memory", "generation"): "together",
    ("longformer", "prefix memory", "classification"): "refused",
    ("mixtral", "lora", "generation"): "together",
    ("opt", "soft_prompt", "classification"): "together",
    ("mamba", "prefix", "generation"): "refused",
    ("bart-uneven", "prefix", "generation"): "together",
    ("t5-gated", "prefix", "generation"): "together",
    ("t5", "soft_prompt", "classification"): "refused",
    ("nemotron", "ln_tuning", "classification"): "together",
    ("prophetnet", "bitfit", "generation"): "together",
    ("prophetnet", "prefix", "generation"): "refused",
}
"""A dozen and a few cells of the matrix, of every method and kind of model (``make test-matrix`` has all)."""


@pytest.mark.parametrize(("name", "method", "task"), list(CELLS), ids=["-".join(cell) for cell in CELLS])
def test_a_cell_of_the_matrix(tmp_path: Path, name: str, method: str, task: str) -> None:
    found = outcome(name, method, task, tmp_path)
    assert found.how == CELLS[name, method, task], found.reason
    assert bool(found.reason) == (found.how != "together")
    assert found.padding == (name not in ("xlnet", "fnet") and (name, method) != ("prophetnet", "bitfit"))


def test_the_matrix_has_every_method_and_some_seventy_architectures() -> None:
    from fedcustom.methods import registry

    assert {name.partition(" ")[0] for name in METHODS} | {"probe"} == {
        n for n, each in registry.methods().items() if each.is_technique
    }
    assert len(ALL) >= 55
    assert {kind_of(name) for name in ALL} == {"encoder", "decoder", "encoder-decoder"}
    assert tasks_of(next(iter(ENCODERS))) == ("classification",)


def test_reasons_are_listed_once() -> None:
    said = "x: in one batch its x code does not give what it gives (a gradient of a.b that differs by 17%)"
    assert general(said, "x") == (
        "MODEL: in one batch its code does not give what it gives (a gradient that differs)"
    )


def test_a_table_is_brought_up_to_date(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    first = {method: Outcome("together", "") for method in METHODS}
    refused = Outcome("refused", "method lora does not fit gpt2: its code has no heads")
    write_table(page, {("bert", "classification"): first, ("gpt2", "generation"): {"lora": refused}})
    write_table(page, {("bert", "classification"): {"full": Outcome("refused", "no such model")}})
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    shown = read_table(text)
    assert shown["bert", "classification"] == dict.fromkeys(METHODS, ("together", "")) | {
        "full": ("-", "no such model")
    }
    assert shown["gpt2", "generation"] == {
        "lora": ("-", "method lora does not fit MODEL: its code has no heads")
    }
    assert text.count("1. no such model\n2. method lora") == 1


@pytest.mark.parametrize("name", ["xlnet", "fnet", "convbert", "mobilebert", "gpt2", "electra"])
def test_a_classifier_gives_a_text_the_same_whatever_is_beside_it(
    models: Callable[[str], str], name: str
) -> None:
    """What plain transformers gives for each text alone, without padding."""
    from transformers import AutoTokenizer

    method = make(models(name), "bitfit")
    assert method.base.padding == ("none" if name in ("xlnet", "fnet", "convbert", "mobilebert") else "right")
    found = method.predict(
        State(method.trainable.read()), [Example(text, 0) for text in TEXTS], texts=False
    ).scores
    tokenizer = AutoTokenizer.from_pretrained(models(name))
    model = method.trainable.model.eval()
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        np.testing.assert_allclose(row, alone.double().numpy(), rtol=1e-4, atol=1e-6)


def test_a_model_whose_rows_depend_on_one_another_is_refused() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0]])

    def mixing(chosen: Any) -> torch.Tensor:
        return rows[list(chosen)] * len(chosen)

    with pytest.raises(ModelError, match="depends on the other texts of its batch"):
        find_padding(torch.nn.Identity(), mixing, "a model")
    assert find_padding(torch.nn.Identity(), lambda chosen: rows[list(chosen)], "a model") == "right"

    def padded(chosen: Any) -> torch.Tensor:
        return rows[list(chosen)] + (len(set(chosen)) - 1)

    assert find_padding(torch.nn.Identity(), padded, "a model") == "none"
    with pytest.raises(ModelError, match="cannot be used here"):
        find_padding(torch.nn.Identity(), padded, "a model", allowed=False)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma", "mixtral", "bart", "t5-gated", "mamba"])
def test_losses_are_those_of_plain_transformers(models: Callable[[str], str], name: str) -> None:
    """Text by text, without padding: the summed cross-entropy of the target's tokens."""
    import transformers

    path, examples = models(name), [Example(text, target=f" {text[-5:]}") for text in TEXTS]
    task = LearningTask("generation", ())
    base = load_base(ModelSettings(base=path), task, seed=0)
    method = make(path, "full", "generation")
    found = predict(base.model, base, method.tokens(examples), EvaluationSettings()).scores
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encodes = kind_of(name) == "encoder-decoder"
    loader: Any = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    model = loader.from_pretrained(path).eval()
    for example, (loss, count) in zip(examples, found, strict=True):
        source = tokenizer(example.text)["input_ids"]
        target = [*tokenizer(example.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if encodes:
            inputs, labels = torch.tensor([source]), torch.tensor([target])
        else:
            inputs = torch.tensor([source + target])
            labels = torch.tensor([[-100] * len(source) + target])
        with torch.no_grad():
            mean = model(input_ids=inputs, labels=labels).loss
        assert count == len(target)
        assert loss == pytest.approx(float(mean) * len(target), rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2"])
def test_soft_prompts_of_a_decoders_classifier(models: Callable[[str], str], name: str) -> None:
    """The head on the state of the last token, of the prompt's vectors and the text's, one text at a time."""
    from transformers import AutoTokenizer

    method = make(models(name), "soft_prompt", length=3)
    tensors = method.initialise().tensors
    found = method.predict(State(tensors), [Example(text, 0) for text in TEXTS], texts=False).scores
    tokenizer = AutoTokenizer.from_pretrained(models(name))
    model = method.base.model
    head = next(tensor for key, tensor in tensors.items() if key.endswith("score.weight"))
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            embedded = torch.cat([tensors["soft_prompt"][None], model.get_input_embeddings()(ids)], dim=1)
            states = model.base_model(inputs_embeds=embedded).last_hidden_state
        np.testing.assert_allclose(row, (states[0, -1] @ head.T).double().numpy(), rtol=1e-4, atol=1e-6)


class Shifted(torch.nn.Module):
    """Gemma's normalisation: it multiplies by one and its weight."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.offset = offset

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., width)."""
        return (
            states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.weight)
        )


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_of_each_clients_own(offset: float) -> None:
    norm = Shifted(6, offset)
    assert gain_offset(norm) == offset
    assert gain_offset(torch.nn.LayerNorm(6)) == 0.0
    assert gain_offset(torch.nn.LayerNorm(6, bias=False)) == 0.0
    assert gain_offset(Shifted(6, 0.5)) is None
    assert gain_offset(torch.nn.Linear(6, 6)) is None
    shared, states = ClientNorm(norm, offset), torch.randn(3, 4, 6)
    own = torch.randn(2, 6)
    shared.given.own, shared.given.owners, shared.given.counts = (
        {"weight": own}, torch.tensor([0, 1, 1]), [1, 2],
    )  # fmt: skip
    found = shared(states)
    for row, client in enumerate([0, 1, 1]):
        with torch.no_grad():
            norm.weight.copy_(own[client])
        torch.testing.assert_close(found[row], norm(states[row]).detach())


def test_batches_of_one_length() -> None:
    rows = [
        TokenizedExample.of([1] * a, [1] * b) for a, b in [(3, 1), (2, 2), (3, 1), (1, 3), (3, 1), (2, 1)]
    ]
    found = list(by_length(rows, 2, equal=True))
    assert sorted(i for some in found for i in some) == list(range(6))
    assert found == [[0, 2], [4], [1], [5], [3]]


def test_a_tokenizer_that_knows_no_word_of_a_trial(tmp_path: Path) -> None:
    """Whose unknown word is its end and its padding: trial passes take ordinary tokens of it."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    folder = write_model("gpt2", tmp_path / "model")
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, 300)}}
    made = Tokenizer(kinds.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    for task in ("classification", "generation"):
        method = make(str(folder), "lora", task)
        assert method.base.padding == "right"
        assert all(0 not in row.source.tolist() for row in method.local.rows)
        assert len({len(row.source) for row in method.local.rows}) == 3


def test_methods_that_pad_refuse_a_model_that_padding_changes(models: Callable[[str], str]) -> None:
    task = LearningTask("classification", ("a", "b"))
    bases = {name: load_base(ModelSettings(base=models(name)), task, seed=0) for name in ("fnet", "bert")}
    check_padding("distillation", bases["bert"])
    with pytest.raises(ModelError, match="method distillation pads its batches, and padding changes"):
        check_padding("distillation", bases["fnet"])
    with pytest.raises(ModelError, match="depends on the other texts of its batch"):
        load_base(ModelSettings(base=models("fnet")), LearningTask("retrieval", ()), seed=0, head=False)


def test_a_trial_leaves_the_model_as_it_was(models: Callable[[str], str]) -> None:
    """BigBird gives up sparse attention for good at the first short text; a trial's text is short."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = models("big_bird")
    method = make(path, "bitfit")
    kinds = {m.attention_type for m in method.base.model.modules() if hasattr(m, "attention_type")}
    assert kinds == {"block_sparse"}
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).eval()
    plain.load_state_dict(method.base.model.state_dict())
    ids = torch.tensor([(AutoTokenizer.from_pretrained(path)(TEXTS[1])["input_ids"] * 9)[:112]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        found, expected = (model(**batch).logits for model in (method.base.model, plain))
    torch.testing.assert_close(found, expected)
