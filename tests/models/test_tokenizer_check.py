"""Tokenizers and positions that do not go with a model: one line at load, checked against plain passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from fedcustom.core.errors import DataError, ModelError
from fedcustom.core.library_errors import from_library, while_loading
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.federated.build import check_fit
from fedcustom.methods.tuning.objective import Supervised
from fedcustom.models.configuration import AFTER_PADDING, context_length, load_configuration
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.recipe.recipe import load_recipe
from helpers.rows import make_rows, write_jsonl
from helpers.tiny_models import tiny_tokenizer

CLASSIFICATION, GENERATION = LearningTask("classification", ("a", "b")), LearningTask("generation")
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 40,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def with_ends() -> Any:
    """The tiny tokenizer, which ends each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def saved(folder: Path, tokenizer: Any, model: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def llama(vocabulary: int, **settings: Any) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=vocabulary, **SMALL, **special, **settings))


def bart(vocabulary: int = 400, **settings: Any) -> Any:
    return t.BartForConditionalGeneration(t.BartConfig(vocab_size=vocabulary, **BART | settings))


def load(folder: str, task: LearningTask, *, head: bool = True) -> Base:
    return load_base(ModelSettings(base=folder), task, 0, head=head)


def test_a_generator_needs_an_end_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    folder = saved(tmp_path, tokenizer, llama(400))
    with pytest.raises(ModelError, match=r"the tokenizer of .* has no end token \(eos_token\)"):
        load(folder, GENERATION)
    load(folder, CLASSIFICATION)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = saved(tmp_path, tokenizer, llama(len(tokenizer) - 1))
    said = f"has {len(tokenizer)} tokens, but the model has embeddings of {len(tokenizer) - 1}"
    for task in (CLASSIFICATION, GENERATION):
        with pytest.raises(ModelError, match=said):
            load(folder, task)


def test_a_padding_token_that_was_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = llama(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    folder = saved(tmp_path, tokenizer, model)
    with pytest.raises(ModelError, match=rf"has the padding token '<new>' as number {len(tokenizer) - 1}"):
        load(folder, CLASSIFICATION)


def test_an_added_token_counts_where_a_text_holds_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = llama(len(tokenizer))
    tokenizer.add_tokens(["<image>"])  # as Gemma's, which has one more than the text model's embedding
    base = load(saved(tmp_path, tokenizer, model), CLASSIFICATION)
    objective = Supervised(base, DataSettings())
    tokens = objective.tokens([Example("the cat", label=0)])
    assert torch.isfinite(objective.loss(base.model, objective.collate(tokens)))
    with pytest.raises(DataError, match="text 1 of 1 holds the token '<image>'"):
        objective.tokens([Example("an <image> of a cat", label=0)])


def test_a_classifier_by_the_end_token(tmp_path: Path) -> None:
    folder = saved(tmp_path / "none", tiny_tokenizer(), bart())
    with pytest.raises(ModelError, match=r"ends a text with 0 end tokens \(number 2, '</s>'\)"):
        load(folder, CLASSIFICATION)
    load(folder, GENERATION)
    base = load(saved(tmp_path / "one", with_ends(), bart()), CLASSIFICATION)
    texts = ["the cat", "<s>old</s> cat"]
    batch = base.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        base.model(**batch)
    with pytest.raises(DataError, match=r"text 2 of 2 has 2 end tokens '</s>'"):
        Supervised(base, DataSettings()).tokens([Example(text, label=0) for text in texts])


def test_a_start_token(tmp_path: Path) -> None:
    folder = saved(tmp_path, with_ends(), bart())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": None}))
    for task in (GENERATION, CLASSIFICATION):
        with pytest.raises(ModelError, match="has no decoder_start_token_id"):
            load(folder, task)


def test_a_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny_tokenizer(), llama(400))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    with pytest.raises(ModelError, match=r"^model.base: cannot load "):
        load(folder, GENERATION)


# --- positions ---


def passes(model: Any, length: int) -> bool:
    """Whether plain ``transformers`` takes so many tokens."""
    ids = torch.full((1, length), 5)
    other = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            model(input_ids=ids, **other)
    except (IndexError, RuntimeError):
        return False
    return True


KINDS = (
    "bert bart camembert data2vec-text gpt2 ibert longformer luke mbart mpnet opt roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl"
)


@pytest.mark.parametrize("kind", KINDS.split())
def test_positions(kind: str) -> None:
    wanted = SMALL | BART | {
        "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "pad_token_id": 1,
        "ffn_dim": 16, "word_embed_proj_dim": 16, "attention_window": [4], "emb_dim": 16,
    }  # fmt: skip
    configuration = t.AutoConfig.for_model(kind)
    for name, value in wanted.items():
        if hasattr(configuration, name):
            setattr(configuration, name, value)
    model = t.AutoModel.from_config(configuration).eval()
    limit = context_length(configuration)
    assert limit == (38 if kind in AFTER_PADDING else 40)
    assert passes(model, limit)
    assert not passes(model, limit + 1)


def recipe(folder: str, task: str, **data: Any) -> Any:
    return load_recipe(
        {"model": {"base": folder}, "data": {"task": task, **data}, "method": {"name": "lora"}}
    )


def test_max_length_beyond_the_positions(tmp_path: Path) -> None:
    model = t.RobertaModel(t.RobertaConfig(vocab_size=400, pad_token_id=1, **SMALL))
    folder = saved(tmp_path / "roberta", with_ends(), model)
    check_fit(recipe(folder, "classification", max_length=38))
    with pytest.raises(ModelError, match=r"data.max_length = 39: .* 39 positions are needed; .* has 38"):
        check_fit(recipe(folder, "classification", max_length=39))


def test_what_is_written_needs_positions_too(tmp_path: Path) -> None:
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=40))
    folder = saved(tmp_path / "gpt2", tiny_tokenizer(), model)
    fits = recipe(folder, "generation", max_length=20, max_target_length=10)
    shorter = fits.model_copy(
        update={"evaluation": fits.evaluation.model_copy(update={"max_new_tokens": 20})}
    )
    check_fit(shorter)
    with pytest.raises(
        ModelError, match=r"data.max_length = 20, evaluation.max_new_tokens = 64: .* 84 positions"
    ):
        check_fit(fits)
    rotary = saved(tmp_path / "llama", tiny_tokenizer(), llama(400))  # goes on beyond what it was trained for
    check_fit(recipe(rotary, "generation", max_length=20, max_target_length=10))


def test_each_half_has_positions_of_its_own(tmp_path: Path) -> None:
    folder = saved(tmp_path, with_ends(), bart())
    fits = recipe(folder, "generation", max_length=40, max_target_length=40)
    check_fit(
        fits.model_copy(update={"evaluation": fits.evaluation.model_copy(update={"max_new_tokens": 40})})
    )
    with pytest.raises(ModelError, match="41 positions are needed"):
        check_fit(recipe(folder, "classification", max_length=41))


def test_relative_positions_have_no_bound(tmp_path: Path) -> None:
    configuration = t.T5Config(vocab_size=400, n_positions=512)
    configuration.save_pretrained(tmp_path)
    assert context_length(load_configuration(ModelSettings(base=str(tmp_path)))) is None


# --- the command line ---


def call(name: str, body: str) -> BaseException:
    """What a function raises that stands in a module of that name."""
    space: dict[str, Any] = {"__name__": name}
    exec(f"def call():\n    {body}", space)
    with pytest.raises(Exception) as error:  # noqa: PT011
        space["call"]()
    return error.value


def test_errors_of_libraries() -> None:
    wrong_file = 'import transformers; transformers.AutoConfig.for_model("none")'
    assert while_loading(call("fedcustom.models.load", wrong_file))
    assert while_loading(call("fedcustom.data.sources", wrong_file))
    elsewhere = call("fedcustom.methods.lora.method", wrong_file)
    assert from_library(elsewhere)
    assert not while_loading(elsewhere)
    ours = call("fedcustom.models.load", 'raise ValueError("a bug")')
    assert not from_library(ours)
    assert not while_loading(ours)
    wrong_call = "import transformers; transformers.AutoConfig.for_model()"
    assert not while_loading(call("fedcustom.models.load", wrong_call))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A recipe of an encoder-decoder classifier, one of whose texts holds the end token."""
    rows = make_rows(40, 0)
    rows[7]["text"] = "<s>struck out</s> cat"
    write_jsonl(tmp_path / "train.jsonl", rows)
    folder = saved(tmp_path / "bart", with_ends(), bart())
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\nbase = "{folder}"\n[data]\nsource = "{tmp_path}/train.jsonl"\nmax_length = 20\n'
        '[clients]\ncolumn = "site"\n[method]\nname = "lora"\n[rounds]\ncount = 1\n'
    )
    return path


def test_one_line_and_exit_code_2(command: Any, broken: Path) -> None:
    out = broken.parent / "out"
    said = command("run", broken, "--out", out, "--quiet")
    assert said.code == 2
    (line,) = said.error.strip().splitlines()
    assert line.startswith("error: client 'site-3', ")
    assert "has 2 end tokens '</s>'" in line
    assert "struck" not in line
    said = command("run", broken, "--debug", "--out", out, "--quiet")
    assert said.code == 2
    assert "Traceback (most recent call last)" in said.error
    assert said.error.strip().splitlines()[-1] == line


def test_a_bug_of_ours_keeps_its_traceback(
    command: Any, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr("fedcustom.federated.client_side.check_cohort", bug)
    with pytest.raises(IndexError, match="a bug"):
        command("run", broken, "--out", broken.parent / "out", "--quiet")
