"""The script that pretrains the built-in language models, on a few sentences."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scripts.pretraining import model, optimizers, training
from scripts.pretraining.checkpoints import PROGRESS, first_progress
from scripts.pretraining.corpus import is_held_out, window_batch
from scripts.pretraining.export import export
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = ["the", "cat", "sees", "an", "old", "house", "near", "river", "and", "sleeps", "long"]
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, 60)) + "." for _ in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def options(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(model.SIZES, "small", TINY)
    return argparse.Namespace(
        corpus=corpus, out=tmp_path / "small", data=corpus.parent / "data", size="small", tokens=8 * 1024,
        batch_tokens=1024, learning_rate=0.01, grow_at=0.5, begin=None, precision="float32", device="cpu",
        compile=False, save_minutes=0, seed=0, export=None,
    )  # fmt: skip


def test_the_chunked_loss_and_its_gradients_are_those_of_the_whole_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(70, 12, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(50, 12, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (70,), generator=generator)
    loss = model.ChunkedCrossEntropy.apply(hidden, weight, target, 16)
    (3 * loss).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_a_model_that_grows_stays_the_same_function(options: argparse.Namespace) -> None:
    tokenizer, tokens, _, _ = training.prepare(options.corpus, options.data)
    shallow = model.build_model("small", tokenizer, 2)
    windows = window_batch(tokens, 0, 2, 32, 0)
    before = optimizers.Optimizers(shallow, "float32")
    model.batch_loss(shallow, windows, "float32").backward()
    before.step(0.01)
    deep, moments = model.grow(shallow, before.state(), "small", tokenizer)
    assert deep.config.num_hidden_layers == 4
    torch.testing.assert_close(deep(windows).logits, shallow(windows).logits)
    after = optimizers.Optimizers(deep, "float32")
    after.restore(moments)
    old, new = dict(shallow.named_parameters()), dict(deep.named_parameters())
    velocity = before.muon.state[old["model.layers.1.mlp.up_proj.weight"]]["velocity"]
    assert torch.equal(after.muon.state[new["model.layers.2.mlp.up_proj.weight"]]["velocity"], velocity)
    model.batch_loss(deep, windows, "float32").backward()
    after.step(0.01)
    assert all(p.isfinite().all() for p in new.values())
    assert new["model.layers.1.mlp.down_proj.weight"].abs().max() > 0  # the copies begin to learn


def test_windows_visit_all_tokens_once_a_pass() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = [window_batch(tokens, step, 3, 32, seed=1) for step in range(10)]
    first = torch.cat(batches)[:, :-1].flatten()
    assert len(first.unique()) == len(first) == 960
    assert all(torch.equal(b[:, 1:], b[:, :-1] + 1) for b in batches)


def test_one_per_cent_of_texts_is_held_out_by_content() -> None:
    share = np.mean([is_held_out(f"text {number}") for number in range(20_000)])
    assert share == pytest.approx(0.01, abs=0.003)


def test_a_run_that_is_killed_goes_on_to_the_same_weights(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.train(options)
    whole = load_file(options.out / "checkpoint" / "model.safetensors")

    save, saved = training.save_checkpoint, []

    def killed(*arguments: Any) -> None:
        save(*arguments)
        saved.append(1)
        if len(saved) in (2, 6):  # once shallow, once grown
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", killed)
    options.out = tmp_path / "killed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            training.train(options)
    training.train(options)
    again = load_file(options.out / "checkpoint" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_ctrl_c_saves_the_step_that_was_done(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    options.save_minutes, loss, asked = 60, training.batch_loss, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        asked.append(1)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(training, "batch_loss", interrupted)
    with pytest.raises(SystemExit, match="130"):
        training.train(options)
    state = json.loads((options.out / "checkpoint" / "state.json").read_text())
    assert (state["tokens"], state["validation"]) == (3 * options.batch_tokens, [])
    training.train(options)
    state = json.loads((options.out / "checkpoint" / "state.json").read_text())
    assert state["tokens"] == options.tokens
    assert len(asked) == 8


def test_an_export_loads_with_transformers_and_training_goes_on_from_it(
    options: argparse.Namespace, tmp_path: Path
) -> None:
    training.train(options)
    options.export = tmp_path / "exported"
    export(options)
    loaded = AutoModelForCausalLM.from_pretrained(options.export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.export)
    weights = load_file(options.out / "checkpoint" / "model.safetensors")
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, weights[name].half().float())
    assert (
        tokenizer.decode(tokenizer("the old house near the river").input_ids)
        == "the old house near the river"
    )
    card = (options.export / "README.md").read_text()
    assert "8,192 (" in card
    assert "bits per byte" in card

    progress = json.loads((options.export / PROGRESS).read_text())
    assert progress["tokens"] == 8 * 1024
    options.begin, options.out, options.tokens = options.export, tmp_path / "further", 10 * 1024
    training.train(options)
    further = json.loads((options.out / "checkpoint" / "state.json").read_text())
    assert further["tokens"] == 10 * 1024
    assert [tokens // 1024 for tokens, _, _ in further["validation"]] == list(range(1, 11))
    options.export = tmp_path / "again"
    export(options)
    card = (options.export / "README.md").read_text()
    assert "| earlier part | the first 8,192 tokens, rate 0.01, falling;" in card
    assert "half the layers for the first 4,096 tokens" in card  # the model grew in its first part
    assert "--grow-at 0.5 --tokens 8192 --learning-rate 0.01" in card
    assert "--begin build/small-1-exported --tokens 10240 --learning-rate 0.01" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "--seed 1: the run in .* was begun with 0"),
        ({"grow_at": 0.0}, "--grow-at 0.0: .* was begun with 0.5"),
        ({"batch_tokens": 2048}, "--batch-tokens 2048"),
        ({"learning_rate": 0.02}, "--learning-rate 0.02"),
    ],
)
def test_other_options_are_refused_on_resuming(
    options: argparse.Namespace, changes: dict[str, Any], message: str
) -> None:
    options.tokens = 1024
    training.train(options)
    options.tokens = 2048
    vars(options).update(changes)
    with pytest.raises(SystemExit, match=message):
        training.train(options)


def test_a_moved_end_is_on_record(options: argparse.Namespace, tmp_path: Path) -> None:
    options.tokens, options.grow_at, options.precision = 2048, 0.0, "auto"
    training.train(options)
    options.tokens, options.export = 4096, tmp_path / "exported"
    training.train(options)
    export(options)
    card = (options.export / "README.md").read_text()
    assert "Until 2,048 tokens, 2,048 were planned" in card
    assert "--tokens 4096" in card
    assert "all layers from the start" in card


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b'{"steps": {}, "layers": 2}'])
def test_damaged_progress_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "training.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"--begin: .*training.json is damaged: "):
        first_progress(tmp_path, 2)


def test_another_corpus_or_a_finished_beginning_is_refused(
    options: argparse.Namespace, corpus: Path, tmp_path: Path
) -> None:
    options.tokens, options.grow_at = 1024, 0.0
    training.train(options)
    options.export = tmp_path / "exported"
    export(options)
    options.begin, options.out = options.export, tmp_path / "further"
    with pytest.raises(SystemExit, match="has seen 1,024 tokens already; give more, in all"):
        training.train(options)
    options.corpus = tmp_path / "other.jsonl"
    options.corpus.write_text(corpus.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(SystemExit, match="was made from another corpus"):
        training.train(options)
