"""The script that trains a model to use demonstrations: what its episodes and repetitions ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts.train_in_context import TEMPLATES, answer_loss, batch_of, episode, main, make_tokenizer, repeated

TEXTS = [" ".join(f"w{i}-{place}" for place in range(8)) for i in range(40)]
WORDS = [f"label{i}" for i in range(30)]


def test_the_answer_is_that_of_the_most_similar_demonstration() -> None:
    generator = np.random.default_rng(0)
    agreed = 0
    for _ in range(200):
        pieces = episode(TEXTS, WORDS, generator)
        questions = [text for text, _ in pieces[0::3]]
        answers = [text for text, learnt in pieces if learnt]
        assert len(questions) == len(answers) >= 2
        assert any(questions[0].startswith(a) and questions[0].endswith(b) for a, b in TEMPLATES)
        query = questions[-1].split()
        shared = [sum(x == y for x, y in zip(query, shown.split(), strict=True)) for shown in questions[:-1]]
        agreed += answers[int(np.argmax(shared))] == answers[-1]
    assert agreed > 180


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds 0 sentences"),
        (b'{"txt": 1}\n', "must hold JSON lines"),
        (b"\xff", "must hold JSON lines"),
    ],
)
def test_a_corpus_that_is_none_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["train", "--corpus", str(corpus), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_answers_alone_are_learnt() -> None:
    tokenizer = make_tokenizer(TEXTS, 400)
    pieces = [
        ("Text: a\nLabel:", False),
        (" b", True),
        ("\n\n", False),
        ("Text: c\nLabel:", False),
        (" d", True),
    ]
    ids, labels = batch_of([pieces, pieces[:2]], tokenizer)
    assert tokenizer.decode(ids[0]) == "".join(text for text, _ in pieces)
    assert tokenizer.decode(labels[0][labels[0] != -100]) == " b d"
    assert tokenizer.decode(labels[1][labels[1] != -100]) == " b"


def test_repetitions_are_learnt_where_they_can_be() -> None:
    ids, labels = repeated(5, 1000, np.random.default_rng(0))
    half = ids.shape[1] // 2
    assert torch.equal(ids[:, :half], ids[:, half:])
    assert (labels[:, : half + 1] == -100).all()
    assert torch.equal(labels[:, half + 1 :], ids[:, half + 1 :])


def test_the_loss_by_hand() -> None:
    class Model:
        def __init__(self) -> None:
            self.states = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
            self.weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))

        def model(self, input_ids: Any) -> Any:
            return type("Output", (), {"last_hidden_state": self.states})

        def lm_head(self, states: Any) -> Any:
            return states @ self.weight.T

    model = Model()
    labels = torch.tensor([[-100, -100, 5, 2]])
    loss = answer_loss(model, torch.zeros(1, 4, dtype=torch.long), labels)
    log_odds = torch.log_softmax(model.states[0] @ model.weight.T, dim=-1)
    torch.testing.assert_close(loss, -(log_odds[1, 5] + log_odds[2, 2]) / 2)
