"""The parts of retrieval, each against a computation by hand or by brute force."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import DataError, UpdateError
from fedcustom.data.examples import Example, LearningTask
from fedcustom.data.settings import DataSettings
from fedcustom.evaluation.metrics import retrieval_metrics
from fedcustom.methods import Update
from fedcustom.methods.retrieval.checks import check_answer
from fedcustom.methods.retrieval.chunking import chunks, digest
from fedcustom.methods.retrieval.client import packed, unpacked
from fedcustom.methods.retrieval.merging import by_rank, by_score
from fedcustom.methods.retrieval.messages import (
    AnswerTask,
    AnswerUpdate,
    CalibrateTask,
    FetchTask,
    FetchUpdate,
    IndexTask,
    IndexUpdate,
    RetrieveTask,
    RouteTask,
    RouteUpdate,
)
from fedcustom.methods.retrieval.privacy import perturbed
from fedcustom.methods.retrieval.router import Sums, choose, fit_router, mass_before, threshold
from fedcustom.methods.retrieval.store import Found, ranked
from fedcustom.methods.tuning.objective import Contrastive
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.report.formatting import metric_name
from helpers.retrieval import documents, store_in, vectors_of
from helpers.tiny_models import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


# --- chunks ---


@given(st.text(max_size=200), st.integers(2, 12), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_chunks_cover_the_text(text: str, length: int, overlap: int) -> None:
    overlap = min(overlap, length - 1)
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = chunks(text, tokenizer, length, overlap, None)
    assert len(pieces) == max(1, -(-(len(ids) - overlap) // (length - overlap)) if len(ids) > overlap else 1)
    place = 0
    for piece in pieces:  # each begins before or where the last one ended
        found = text.find(piece, 0)
        assert found >= 0 or not piece
        place = max(place, text.find(piece) + len(piece))
    assert chunks(text, tokenizer, length, overlap, 1) == pieces[:1]


def test_chunks_by_hand(tokenizer: Any) -> None:
    text = "the cat sees the old dog near the house"
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    first, second = chunks(text, tokenizer, 6, 2, None)[:2]
    assert first == text[offsets[0][0] : offsets[5][1]]
    assert second == text[offsets[4][0] : offsets[min(9, len(offsets) - 1)][1]]


# --- the store ---


def brute_force(texts: Sequence[str], tokenizer: Any, queries: Any, top: int) -> list[Found]:
    found = []
    for query in queries:
        best = {}
        for text in dict.fromkeys(texts):
            pieces = vectors_of(chunks(text, tokenizer, 8, 2, None)).astype(np.float64)
            best[digest(text)] = float(np.float32((pieces @ query.astype(np.float64)).max()))
        found.append(ranked(best, top))
    return found


def test_search_equals_brute_force(tmp_path: Path, tokenizer: Any) -> None:
    texts = documents(60)
    store = store_in(tmp_path, tokenizer)
    updated = store.update([*texts, texts[0]], vectors_of)
    assert updated.documents == updated.added == 60
    queries = vectors_of([f"question {i}" for i in range(70)])
    assert store.search(queries, 5) == brute_force(texts, tokenizer, queries, 5)
    assert [len(each.documents) for each in store.search(queries[:1], 100)] == [60]


def test_an_update_embeds_what_is_new_alone(tmp_path: Path, tokenizer: Any) -> None:
    store, embedded = store_in(tmp_path, tokenizer), []

    def embed(texts: Sequence[str]) -> Any:
        embedded.extend(texts)
        return vectors_of(texts)

    store.update(documents(20), embed)
    embedded.clear()
    updated = store.update(documents(20, 5), embed)
    assert (updated.documents, updated.added, updated.deleted) == (20, 5, 5)
    assert {piece for text in documents(5, 20) for piece in chunks(text, tokenizer, 8, 2, None)} == set(
        embedded
    )
    queries = vectors_of(["a", "b", "c"])
    assert store.search(queries, 4) == brute_force(documents(20, 5), tokenizer, queries, 4)
    embedded.clear()
    assert store.update(documents(20, 5), embed).added == 0
    assert not embedded
    assert store_in(tmp_path, tokenizer, "another").update(documents(3), embed).added == 3


def test_words(tmp_path: Path, tokenizer: Any) -> None:
    store = store_in(tmp_path, tokenizer)
    texts = ["the mouse eats bread", "a horse in the garden", "bread and milk and more bread"]
    store.update(texts, vectors_of)
    (found,) = store.search_words(["bread"], 5)
    assert set(found.documents) == {digest(texts[0]), digest(texts[2])}
    assert found.scores == sorted(found.scores, reverse=True)
    assert store.passages([digest(texts[1])])[digest(texts[1])].startswith("a horse")
    with pytest.raises(DataError, match="no document 00"):
        store.passages(["00"])
    with pytest.raises(DataError, match="no document is called"):
        store.passages(["x' OR '1'='1"])


def test_a_store_that_lacks_chunks_is_not_served(tmp_path: Path, tokenizer: Any) -> None:
    store = store_in(tmp_path, tokenizer)
    with pytest.raises(DataError, match="no finished index"):
        store.search(vectors_of(["a"]), 3)
    store.update(documents(5), vectors_of)
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"chunks": ', '"chunks": 9'))
    with pytest.raises(DataError, match="build it again"):
        store.search(vectors_of(["a"]), 3)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.retrieval import documents, store_in, vectors_of
from helpers.tiny_models import tiny_tokenizer
import fedcustom.methods.retrieval.store as module

module.DOCUMENTS_AT_ONCE = 4
calls = 0

def embed(texts):
    global calls
    calls += 1
    if calls > {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return vectors_of(texts)

store_in(Path({folder!r}), tiny_tokenizer()).update(documents({count}, {start}), embed)
"""


def killed(folder: Path, calls: int, count: int, start: int) -> None:
    script = KILLED.format(
        tests=str(Path(__file__).parents[2]), folder=str(folder), calls=calls, count=count, start=start
    )
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_build_is_never_silently_short(tmp_path: Path, tokenizer: Any) -> None:
    store, queries = store_in(tmp_path, tokenizer), vectors_of(["a", "b"])
    killed(tmp_path, 2, 20, 0)
    with pytest.raises(DataError, match="no finished index"):
        store.search(queries, 3)
    assert store.update(documents(20), vectors_of).added == 20
    assert store.search(queries, 3) == brute_force(documents(20), tokenizer, queries, 3)
    killed(tmp_path, 1, 20, 10)  # an update of a whole store: it stays as it was
    assert store.search(queries, 3) == brute_force(documents(20), tokenizer, queries, 3)
    updated = store.update(documents(20, 10), vectors_of)
    assert (updated.added, updated.deleted) == (10, 10)
    assert store.search(queries, 3) == brute_force(documents(20, 10), tokenizer, queries, 3)


def test_without_the_library(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(DataError, match=r"pip install 'fedcustom\[retrieval\]'"):
        store_in(tmp_path, tokenizer).update(documents(2), vectors_of)


# --- merging ---

names = st.integers(0, 30).map(lambda i: f"{i:032x}")
lists = st.dictionaries(names, st.integers(-3, 3).map(float), max_size=12)


@given(st.dictionaries(st.sampled_from("abcd"), lists, min_size=1, max_size=4), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_merging_by_score_is_one_list(clients: dict[str, dict[str, float]], top: int) -> None:
    merged = by_score({name: ranked(scores, top) for name, scores in clients.items()}, top)
    together: dict[str, float] = {}
    for scores in clients.values():
        for name, score in scores.items():
            together[name] = max(score, together.get(name, -9.0))
    expected = ranked(together, top)
    assert [hit.document for hit in merged] == expected.documents
    assert [hit.score for hit in merged] == expected.scores
    assert all(clients[hit.client][hit.document] == hit.score for hit in merged)


def test_reciprocal_ranks_by_hand() -> None:
    one = {"a": Found(["x", "y"], [9.0, 1.0]), "b": Found(["z"], [0.1])}
    two = {"a": Found(["y"], [3.0])}
    hits = by_rank([one, two], 3)
    assert [(hit.document, hit.client) for hit in hits] == [("y", "a"), ("x", "a"), ("z", "b")]
    assert hits[0].score == pytest.approx(1 / 62 + 1 / 61)
    assert hits[1].score == hits[2].score == pytest.approx(1 / 61)


# --- routing ---


def test_the_router_is_that_of_all_questions_in_one_place() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = np.random.default_rng(0)
    counts, width = [40, 25, 60], 5
    rows = [generator.normal(size=(n, width)) + 2 * generator.normal(size=width) for n in counts]
    clients = {f"c{i}": Sums.of(torch.from_numpy(each)) for i, each in enumerate(rows)}
    weight, bias = fit_router(clients)
    everything, labels = np.concatenate(rows), np.repeat(range(3), counts)
    means = np.stack([each.mean(axis=0) for each in rows])
    centred = everything - means[labels]
    within = centred.T @ centred / (len(everything) - 3)
    within += 0.05 * np.trace(within) / width * np.eye(width)
    expected = np.linalg.solve(within, means.T).T
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-9)
    offset = -0.5 * (expected * means).sum(axis=1) + np.log(np.array(counts) / sum(counts))
    np.testing.assert_allclose(bias.numpy(), offset, rtol=1e-9)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(everything, labels).predict(everything)
    ours = (everything @ weight.numpy().T + bias.numpy()).argmax(axis=1)
    assert (ours == theirs).mean() > 0.97  # theirs has no ridge


@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_so_many_reach_their_own_client(seed: int, recall: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    own = torch.randint(6, (50,), generator=generator)
    mass = threshold(mass_before(logits, own), recall)
    asked = choose(logits, mass)
    assert asked[torch.arange(50), own].double().mean() >= recall - 1e-9
    assert asked.any(dim=1).all()
    for row, odds in zip(asked, torch.softmax(logits, dim=1), strict=True):
        for client in range(6):
            before = odds[odds > odds[client]].sum()
            likeliest = bool(odds[client] == odds.max())
            assert bool(row[client]) == (likeliest or bool(before <= mass + 1e-12))


# --- privacy, loss, metrics ---


def test_noise_has_the_mechanisms_length() -> None:
    start = np.zeros((4000, 16), dtype=np.float32)
    noise = perturbed(start, 40.0, np.random.default_rng(0))
    lengths = np.linalg.norm(noise, axis=1)
    assert lengths.mean() == pytest.approx(16 / 40, rel=0.02)  # Gamma(n, 1 / epsilon)
    assert lengths.std() == pytest.approx(16**0.5 / 40, rel=0.05)
    assert np.abs((noise / lengths[:, None]).mean(axis=0)).max() < 0.02


def test_contrastive_loss_by_hand(tiny: dict[str, str]) -> None:
    base = load_base(ModelSettings(base=tiny["bert"]), LearningTask("retrieval"), 0, head=False)
    objective = Contrastive(base, DataSettings(task="retrieval", max_length=16, max_target_length=16), 0.1)
    examples = [
        Example("the cat", target="a bird"),
        Example("old bread", target="near the river"),
        Example("a dog", target="a bird"),
    ]
    loss = objective.loss(base.model, objective.collate(objective.tokens(examples)))

    def unit(text: str) -> torch.Tensor:
        states = base.model(**base.tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        mean = states.last_hidden_state[0].mean(dim=0)
        return mean / mean.norm()

    q, p = [unit(e.text) for e in examples], [unit(e.target) for e in examples]
    negatives = {0: [0, 1], 1: [0, 1, 2], 2: [1, 2]}  # the same passage is no negative
    terms = [
        -torch.log(torch.exp(q[i] @ p[i] / 0.1) / sum(torch.exp(q[i] @ p[j] / 0.1) for j in negatives[i]))
        for i in range(3)
    ]
    torch.testing.assert_close(loss, sum(terms) / 3, rtol=1e-4, atol=1e-5)

    others = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)))
    objective.negatives = others.half()
    loss = objective.loss(base.model, objective.collate(objective.tokens(examples)))
    terms = []
    for i in range(3):
        every = [p[j] for j in negatives[i]] + list(others.half().float())
        terms.append(-torch.log(torch.exp(q[i] @ p[i] / 0.1) / sum(torch.exp(q[i] @ x / 0.1) for x in every)))
    torch.testing.assert_close(loss, sum(terms) / 3, rtol=1e-4, atol=1e-5)


def test_recall_by_hand() -> None:
    found = retrieval_metrics([1, 3, 0, 7], [0.5, 0.5, 1.0, 1.0])
    assert found == {
        "recall_at_1": 0.25, "recall_at_5": 0.5, "recall_at_10": 0.75,
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 7) / 4), "clients_asked": 0.75,
    }  # fmt: skip


def test_ranks_beyond_ten_count_as_not_found() -> None:
    ranks = [2, 10, 11, 400]
    found = retrieval_metrics(ranks, [1.0] * 4)
    assert found == retrieval_metrics([2, 10, 0, 0], [1.0] * 4)
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 10) / 4)
    assert metric_name("mrr") == "MRR@10"


# --- what a client may answer ---


def test_lists_survive_the_wire() -> None:
    found = [Found([digest("a"), digest("b")], [0.5, 0.25]), Found([], [])]
    assert unpacked("vector", packed("vector", found, 3)) == found


def test_unsound_answers_are_refused() -> None:
    task = RetrieveTask({"queries": torch.ones(2, 4) / 2}, top=3, encoder="e")
    sound = packed("vector", [Found([digest("a")], [0.5]), Found([], [])], 3)
    check_answer(task, Update(sound), 4)
    twice = packed("vector", [Found([digest("a"), digest("a")], [0.5, 0.5]), Found([], [])], 3)
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**sound, "vector/scores": torch.zeros(2, 4)}, "vector/scores is"),
        ({**sound, "vector/scores": torch.full((2, 3), torch.nan)}, "not finite"),
        ({**sound, "vector/counts": torch.tensor([4, 0])}, "between 0 and 3"),
        ({**sound, "text/scores": torch.zeros(2, 3)}, "not asked for"),
        (twice, "twice"),
        ({}, "vector/scores is None"),
    ]
    for tensors, message in bad:
        with pytest.raises(UpdateError, match=message):
            check_answer(task, Update(tensors), 4)
    with pytest.raises(UpdateError, match="not a number of chunks"):
        check_answer(IndexTask(encoder="e"), IndexUpdate(documents=3, chunks=-1), 4)
    with pytest.raises(UpdateError, match="those that were asked for"):
        check_answer(FetchTask(encoder="e", documents=["a"]), FetchUpdate(passages={"b": "x"}), 4)
    task = AnswerTask(encoder="e", question="?", documents=[])
    with pytest.raises(UpdateError, match="longer than"):
        check_answer(task, AnswerUpdate(answer="x" * 200_000), 4)
    with pytest.raises(UpdateError, match="total is"):
        check_answer(RouteTask(), RouteUpdate({"total": torch.zeros(3)}, questions=2), 4)
    masses = torch.tensor([2.0], dtype=torch.float64)
    with pytest.raises(UpdateError, match="between 0 and 1"):
        check_answer(CalibrateTask(own=0), Update({"masses": masses}), 4)
