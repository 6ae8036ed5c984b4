"""What a malicious server tries at a site, and what it gets: the table of docs/deployment.md."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedcustom.core.errors import PolicyError
from fedcustom.deployment.site.limits import CANCEL_FILE
from fedcustom.deployment.site.models import folder_digest
from fedcustom.deployment.site.policy import check_recipe, evaluations_of
from fedcustom.deployment.site.settings import PolicySettings
from fedcustom.federated.resolve import resolved
from fedcustom.methods import Work
from fedcustom.methods.contents import CONTENTS
from fedcustom.methods.prompt_engineering.limits import check_bred
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.messages import values_of
from helpers.malicious import Server
from helpers.rows import make_rows

PRIVATE = ("ssn", "patient", "notes")

DECLARED = {"columns": ["text", "label"], "text": "{text}", "label": "label", "max_labels": 3}

Make = Callable[..., Server]


@pytest.fixture
def recipe(tiny: dict[str, str]) -> dict[str, Any]:
    """Prefix-tuning of a tiny encoder in two rounds, which fits no head."""
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": ".", "max_length": 24},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8, "logit_adjustment": 0},
        "rounds": {"count": 2},
        "evaluation": {"batch_size": 32},
    }


@pytest.fixture
def make(tmp_path: Path, tiny: dict[str, str]) -> Make:
    """Makes a site with 60 rows, whose other columns are private."""

    def made(data: dict[str, Any] | None = None, rows: Any = None, **policy: Any) -> Server:
        own = [
            {**row, **{name: f"{name}-{number}" for name in PRIVATE}}
            for number, row in enumerate(rows or make_rows(60, 0))
        ]
        models = {"base_models": [tiny["bert"]]}
        choices = {"least_examples": 4, **models, **policy}
        return Server(tmp_path, own, DECLARED if data is None else data, choices)

    return made


def without_secrets(server: Server, *said: Any) -> None:
    """No reply and no line of the audit log holds a value of a private column."""
    text = json.dumps(said) + (server.own / "audit.jsonl").read_text()
    assert not any(f"{name}-" in text for name in PRIVATE)


# --- columns and labels ---


@pytest.mark.parametrize(
    "data",
    [
        {"label": "ssn"},
        {"label": "notes", "text": "{patient}"},
        {"text": "{text} {ssn} {notes}"},
    ],
)
def test_the_recipes_columns_do_not_count(make: Make, recipe: dict[str, Any], data: dict[str, str]) -> None:
    server = make()
    said = server.begin({**recipe, "data": {**recipe["data"], **data}})
    assert said["values"]["sizes"] == {"train": 48, "development": 6, "test": 6}
    assert server.site.runs._described is not None
    _, complete, rows = server.site.runs._described
    assert {name for row in rows.train for name in row} == {"text", "label"}
    labels = server.site.handle(
        {
            "kind": "describe",
            "run": "1" * 16,
            "values": {"recipe": complete.model_dump(mode="json")},
        }
    )
    assert labels["values"]["labels"] == ["animal", "food", "place"]
    without_secrets(server, said, labels)


@pytest.mark.parametrize("task", ["generation", "retrieval"])
def test_a_task_that_the_site_declared_no_templates_for(
    make: Make, recipe: dict[str, Any], task: str
) -> None:
    """A site of ``text`` and ``label`` was made to build ``{patient}`` -> ``{notes}``."""
    server = make(texts=True, vectors=True)
    method = {"name": "retrieval"} if task == "retrieval" else recipe["method"]
    data = {**recipe["data"], "task": task, "prompt": "{patient}", "target": "{notes}"}
    training = {} if task == "retrieval" else {"batch_size": 8}
    rounds = {"count": 1} if task == "retrieval" else recipe["rounds"]
    said = server.begin({**recipe, "data": data, "method": method, "training": training, "rounds": rounds})
    assert said["refused"].startswith("data.prompt is not set in this site's site.toml")
    assert 'prompt = "{patient}"' in said["refused"]
    without_secrets(server, said)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, 'data.columns is not set .* columns = \\["text", "label"\\]'),
        ({"columns": ["text", "label"]}, 'data.text is not set .* text = "\\{text\\}"'),
        ({"columns": ["text", "label"], "text": "{text}"}, 'data.label is not set .* label = "label"'),
        ({**DECLARED, "max_labels": None}, "data.labels is not set .* max_labels = 20"),
        ({**DECLARED, "max_labels": 2}, "data.max_labels = 2: .* more distinct values"),
        ({**DECLARED, "columns": ["text", "label", "ssn"], "label": "ssn"}, "max_labels = 3"),
        ({**DECLARED, "columns": ["label"]}, "data.columns lacks a column"),
    ],
)
def test_what_is_not_declared_is_refused_with_its_line(
    make: Make, recipe: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    server = make(data)
    said = server.begin(recipe)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said.get("refused") or said["error"])
    without_secrets(server, said)


def test_declared_labels_are_told_whatever_occurs(make: Make, recipe: dict[str, Any]) -> None:
    data = {**DECLARED, "max_labels": None, "labels": ["animal", "food", "place", "tool"]}
    server = make(data)
    content = resolved(load_recipe(recipe)).model_dump(mode="json", exclude_none=True)
    said = server.ask("describe", values={"recipe": content})
    assert said["values"]["labels"] == ["animal", "food", "place", "tool"]
    server = make({**data, "labels": ["animal", "food"]})
    assert server.ask("describe", values={"recipe": content}) == {"error": "DataError"}
    assert "label 'place' is not among data.labels" in (server.own / "errors.log").read_text()


# --- kinds of content ---

RETRIEVAL = {
    "data": {"task": "retrieval", "prompt": "{q}", "target": "{a}"},
    "method": {"name": "retrieval"},
    "rounds": {"count": 1},
}
ROUTED = {**RETRIEVAL, "method": {"name": "retrieval", "routing": "learned"}}
GENERATION = {"data": {"task": "generation"}, "public": {"source": "."}}

ASKS: list[tuple[dict[str, Any], set[str]]] = [
    ({"training": {"logit_adjustment": 0}}, {"updates", "counts"}),
    ({}, {"updates", "counts", "sums"}),
    ({"method": {"name": "probe"}}, {"counts", "sums"}),
    (RETRIEVAL, {"counts", "vectors"}),
    (ROUTED, {"counts", "vectors", "sums", "logits"}),
    (
        {**RETRIEVAL, "method": {"name": "retrieval", "train": "full", "shared_negatives": 4}},
        {"counts", "vectors", "updates"},
    ),
    ({"method": {"name": "distillation"}, "public": {"source": "."}}, {"counts", "logits"}),
    ({"method": {"name": "prompt_engineering"}}, {"counts"}),
    ({"method": {"name": "prompt_engineering", "strategy": "black_box"}}, {"counts", "updates"}),
    (
        {**GENERATION, "method": {"name": "prompt_engineering", "strategy": "in_context"}},
        {"counts", "logits", "texts"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "needed"), ASKS)
def test_a_recipe_needs_exactly_these_kinds_of_content(changes: dict[str, Any], needed: set[str]) -> None:
    base = "builtin:lm-small" if changes.get("data", {}).get("task") == "generation" else "builtin:minilm"
    asked = resolved(load_recipe({"model": {"base": base}, **changes}))
    everything = dict.fromkeys(CONTENTS, True)
    check_recipe(PolicySettings(**everything), asked)
    for content in CONTENTS:
        policy = PolicySettings(**{**everything, content: False})
        if content in needed:
            with pytest.raises(PolicyError, match=f"policy.{content} = false: .* {content} = true"):
                check_recipe(policy, asked)
        else:
            check_recipe(policy, asked)


def test_a_site_that_chose_nothing_trains_and_gives_nothing_else() -> None:
    policy = PolicySettings()
    assert [content for content in CONTENTS if getattr(policy, content)] == ["updates", "counts"]
    check_recipe(policy, resolved(load_recipe({"training": {"logit_adjustment": 0}})))


def test_vectors_of_documents_are_not_read_out_by_unit_queries(
    make: Make, recipe: dict[str, Any], tiny: dict[str, str]
) -> None:
    """One ``retrieve`` with 32 unit queries returned the vectors of 40 of 40 documents."""
    method = {"name": "retrieval", "chunk_length": 12, "chunk_overlap": 2, "routing": "learned", "top": 5}
    task = {"task": "retrieval", "prompt": "{q}", "target": "{a}", "max_length": 16, "max_target_length": 16}
    retrieval = {
        **recipe,
        "data": {"source": ".", **task},
        "method": method,
        "training": {},
        "rounds": {"count": 1},
    }
    rows = [{"q": f"what is {n}", "a": f"number {n} is a thing"} for n in range(40)]
    data = {"columns": ["q", "a"], "prompt": "{q}", "target": "{a}"}
    for denied in ("vectors", "sums", "logits"):
        choices = {content: content != denied for content in ("vectors", "sums", "logits")}
        assert f"policy.{denied} = false" in make(data, rows, **choices).begin(retrieval, run=9)["refused"]
    server = make(data, rows, vectors=True, sums=True, logits=True, max_top=5, max_queries_per_day=40)
    server.begin(retrieval, labels=[])
    encoder = "ab" * 32
    assert server.ask("work", task="index", values={"encoder": encoder})["values"]["documents"] == 40
    units = torch.eye(32)

    def retrieve(count: int, top: Any = 5, **more: Any) -> dict[str, Any]:
        values = {"encoder": encoder, "top": top, **more}
        return server.ask("work", {"queries": units[:count].contiguous()}, task="retrieve", values=values)

    assert "values" in retrieve(8)
    for top in (40, 6, 4, "5", True, None):
        said = retrieve(8, top)
        assert "method.top = 5" in said.get("refused", "") or "task 'retrieve': top" in said["error"]
    assert "method.search = 'vector'" in retrieve(8, texts=["x"])["refused"]
    assert "values" in retrieve(32)
    assert "policy.max_queries_per_day = 40: 40 have been answered, 1 more" in retrieve(1)["refused"]
    for task in ("fetch", "answer"):
        query = {"encoder": encoder, **({"question": "what is 1"} if task == "answer" else {})}
        said = server.ask("work", task=task, values={**query, "documents": ["a" * 32]})
        assert "policy.texts = false" in said["refused"]
        said = server.ask("work", task=task, values={**query, "documents": ["a"] * 100})
        assert "documents: the recipe asks for at most" in said["refused"]
    assert server.ask("work", task="count", values={"round": 1})["refused"].endswith(
        "belongs to a round, and the message names none"
    )
    # A site that gives fewer documents than the recipe wants refuses the search.
    server = make(data, rows, vectors=True, sums=True, logits=True, max_top=4)
    server.begin(retrieval, run=1, labels=[])
    assert "policy.max_top = 4" in retrieve(1)["refused"]


# --- one ledger ---


def test_twelve_names_of_runs_are_one_round(make: Make, recipe: dict[str, Any]) -> None:
    server = make(max_rounds=1)
    answers = []
    for run in range(12):
        assert "values" in server.begin(recipe, run=run)
        answers.append(server.train())
        if run == 5:
            server.restart()
    assert ["values" in said for said in answers] == [True] + [False] * 11
    assert all("policy.max_rounds = 1" in said["refused"] for said in answers[1:])
    ledger = json.loads((server.own / "ledger.json").read_text())
    assert (ledger["totals"]["rounds"], ledger["totals"]["runs"], len(ledger["runs"])) == (1, 12, 12)


def test_the_same_request_is_the_same_round(make: Make, recipe: dict[str, Any]) -> None:
    server = make(max_rounds=1)
    server.begin(recipe)
    first = server.train()
    assert server.train()["values"] == first["values"]
    assert server.site.ledger.total("rounds") == 1
    assert "policy.max_rounds = 1" in server.train(2)["refused"]


def test_a_run_asks_for_no_more_tasks_than_its_rounds_need(make: Make, recipe: dict[str, Any]) -> None:
    server = make()
    server.begin({**recipe, "rounds": {"count": 1}})
    answers = [server.train() for _ in range(13)]
    assert all("values" in said for said in answers[:12])  # 4 a round, and 8
    assert "the run has asked for 12 tasks" in answers[12]["refused"]


@pytest.mark.parametrize("limit", ["max_total_megabytes", "max_megabytes_per_day"])
def test_bytes_of_all_runs_count(make: Make, recipe: dict[str, Any], limit: str) -> None:
    server = make()
    server.begin(recipe)
    size = server.train()["bytes"]
    assert server.site.ledger.total("bytes") > size
    server.site.settings = server.site.settings.model_copy(
        update={"policy": server.site.settings.policy.model_copy(update={limit: 2.5 * size / 1e6})}
    )
    answers = []
    for run in (1, 2, 3):
        server.begin(recipe, run=run)
        answers.append(server.train() if server.site.participant else {"refused": f"policy.{limit}"})
    assert "values" in answers[0]
    assert all(f"policy.{limit}" in said["refused"] for said in answers[1:])


# --- evaluations ---


def test_a_state_is_evaluated_no_more_often_than_the_recipe_does(make: Make, recipe: dict[str, Any]) -> None:
    """50 evaluations were an oracle of loss and confusion for any state."""
    server = make()
    server.begin(recipe)
    for part in ("development", "test"):
        most = evaluations_of(resolved(load_recipe(recipe)))[part]
        answers = [server.evaluate(part, scale=1 + number) for number in range(50)]
        assert sum("values" in said for said in answers) == most
        assert f"has had {most} evaluations on the {part} part" in answers[-1]["refused"]
        assert "values" in server.evaluate(part), "the same again tells nothing new"
    assert server.site.ledger.total("evaluations") == sum(evaluations_of(load_recipe(recipe)).values())


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"max_rounds": 0}, "policy.max_rounds = 0"),
        ({"evaluate": False}, "policy.evaluate = false"),
        ({"counts": False}, "policy.counts = false"),
        ({"max_evaluations": 0}, "policy.max_evaluations = 0"),
        ({"max_evaluations_per_day": 0}, "policy.max_evaluations_per_day = 0"),
        ({"least_examples": 7}, "policy.least_examples = 7: there are fewer test examples"),
    ],
)
def test_an_evaluation_that_the_site_does_not_give(
    make: Make, recipe: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    server = make(**policy)
    said = server.begin(recipe)
    if "refused" not in said:
        if "least_examples" in policy:
            assert said["values"]["sizes"] == {"train": 48, "development": 0, "test": 0}
        said = server.evaluate()
    assert reason in said["refused"]


@pytest.mark.parametrize("part", ["train", "name", "__class__", None, ["test"], 3, {"test": 1}])
def test_only_declared_parts_are_evaluated(make: Make, recipe: dict[str, Any], part: Any) -> None:
    server = make()
    server.begin(recipe)
    assert server.evaluate(part)["error"].startswith("a message's ")
    assert server.site.ledger.total("evaluations") == 0


@pytest.mark.parametrize("after", [-1, 10**9, "0", 1.0, None, True])
def test_an_evaluation_names_a_round(make: Make, recipe: dict[str, Any], after: Any) -> None:
    server = make()
    server.begin(recipe)
    assert server.evaluate(after=after)["error"].startswith("a message's ")
    assert "rounds.count = 2" in server.evaluate(after=3)["refused"]


# --- least sizes ---


@pytest.mark.parametrize(
    ("training", "policy", "reason"),
    [
        ({"batch_size": 1, "local_steps": 1}, {}, "least_batch_size = 4: the recipe says"),
        ({"batch_size": 8, "local_steps": 1}, {"least_examples": 10}, "least_examples = 10: .* have 8"),
        ({"batch_size": 8, "local_epochs": 0.1}, {"least_examples": 10}, "least_examples = 10: .* have 5"),
        ({"batch_size": 8, "local_steps": 1}, {"least_steps": 2}, "least_steps = 2: the recipe says"),
        ({"batch_size": 16, "local_epochs": 1}, {"least_steps": 4}, "least_steps = 4: .* have 3 steps"),
    ],
)  # fmt: skip
def test_no_update_of_single_examples(
    make: Make, recipe: dict[str, Any], training: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    """A full model, SGD, one example: the exact tokens of a training text came back in 14 of 16 rounds."""
    full = {
        **recipe,
        "method": {"name": "full"},
        "training": {"optimizer": "sgd", "logit_adjustment": 0, **training},
    }
    server = make(**policy)
    said = server.begin(full)
    if "values" in said:
        amounts = {"steps": 1} if "local_steps" in training else {"epochs": training["local_epochs"]}
        said = server.train(**amounts)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said.get("refused") or said["error"])


@pytest.mark.parametrize("asked", [{}, {"fit_head_least_texts": 1}])
def test_sums_of_rare_labels_are_withheld_counted_and_said(
    make: Make, recipe: dict[str, Any], asked: dict[str, Any]
) -> None:
    """By the site's own minimum, whatever the recipe asks."""
    rows = [row for row in make_rows(120, 0) if row["label"] != "place"][:60]
    rows = [*rows, *[{**row, "label": "place"} for row in rows[:3]]]
    server = make({**DECLARED}, rows, sums=True)
    server.begin({**recipe, "training": {"batch_size": 8, "fit_head_rounds": [1], **asked}})
    assert server.site.participant is not None
    assert server.site.participant.method.client.head.least == 5  # type: ignore[attr-defined]
    counts = Counter(example.label for example in server.site.participant.data.train)
    assert 0 < counts[2] < 5 <= min(counts[0], counts[1])
    said = server.train()
    sent = safetensors.torch.load_file(said["body"])
    assert sent["counts"].tolist() == sent["counted"].tolist() == [counts[0], counts[1], 0]
    assert len(sent["totals"]) == 2
    assert said["values"]["weight"] == counts[0] + counts[1]
    log = [json.loads(line) for line in (server.own / "audit.jsonl").read_text().splitlines()]
    (withheld,) = [event for event in log if event["event"] == "withheld"]
    assert (withheld["labels"], withheld["examples"]) == (1, counts[2])
    gradient = server.ask(
        "work", {"head_point": torch.zeros(3, 33)}, task="head gradient", round=1, values={"round": 1}
    )
    found = safetensors.torch.load_file(gradient["body"])["gradient"]
    # At a head of zeros the bias of label l has sum(1/3 - [label = l]): nobody of the third label is in it.
    seen = counts[0] + counts[1]
    assert found[:, -1].tolist() == pytest.approx(
        [seen / 3 - counts[0], seen / 3 - counts[1], seen / 3], rel=1e-4
    )


# --- amounts, seconds, memory ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"steps": 10**9},
            "epochs = 1, steps = .*|steps = 1000000000, epochs = 1.*: the recipe says epochs = 1",
        ),
        ({"epochs": 10**8}, "epochs = 100000000[.]0: the recipe says epochs = 1"),
        ({"epochs": 0.5}, "epochs = 0.5: the recipe says epochs = 1"),
        ({"epochs": True}, "epochs: input should be a valid number"),
        ({"epochs": "1"}, "epochs: input should be a valid number"),
        ({"epochs": 10**400}, "epochs: input should be a finite number"),
        ({"examples": 10**9}, "examples = 1000000000"),
        ({"batches": 10**6}, "batches = 1000000"),
        ({"learning_rate_factor": 1e30}, "learning_rate_factor = 1e[+]30: the recipe's schedule says 1"),
        ({"learning_rate_factor": float("nan")}, "learning_rate_factor: input should be a finite number"),
        ({"round": 2}, "round 1: the task names another round"),
        ({"fields": {"round": 3}}, "round 3: the recipe has rounds.count = 2"),
        ({"fields": {"round": None}}, "belongs to a round, and the message names none"),
        ({"fields": {"task": "distil"}}, "task 'distil': the run's method has no such task"),
        (
            {"fields": {"task": "retrieve", "round": None}},
            "task 'retrieve': the run's method has no such task",
        ),
    ],
)
def test_a_tasks_amounts_are_the_recipes(
    make: Make, recipe: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    server = make()
    server.begin(recipe)
    method = server.method
    task = method.configure(method.initialise(), 1, {"site-0": Work(epochs=1)})["site-0"]
    fields = {"task": "train", "round": 1} | changes.get("fields", {})
    values = {**values_of(task), **{key: value for key, value in changes.items() if key != "fields"}}
    begun = time.monotonic()
    said = server.ask("work", task.tensors, values=values, **fields)
    assert time.monotonic() - begun < 5
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said.get("refused") or said["error"])
    assert server.site.ledger.total("rounds") == 0


@pytest.mark.parametrize(
    "values",
    [
        {"labels": [str(number) for number in range(2_000_000)]},
        {"labels": ["animal", "food", "place", "x" * 10**6]},
        {"labels": ["animal", "food", "place", "place"]},
        {"labels": ["animal", "food", "place", 7]},
        {"labels": "animal"},
        {"names": [f"site-{number}" for number in range(2_000_000)]},
        {"names": None},
    ],
)  # fmt: skip
def test_a_run_is_opened_with_plausible_names(
    make: Make, recipe: dict[str, Any], values: dict[str, Any]
) -> None:
    server = make()
    server.begin(recipe)
    given = {"names": ["site-0"], "labels": ["animal", "food", "place"], **values}
    assert "refused" in server.ask("open", values=given)


def endless(*_: Any) -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # as a library that handles every error
            continue


def test_a_task_that_takes_too_long_is_stopped(
    make: Make, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(max_task_seconds=60.0)
    server.begin(recipe)
    expected = server.train()
    policy = server.settings.policy.model_copy(update={"max_task_seconds": 0.5})
    server.site.settings = server.settings.model_copy(update={"policy": policy})
    monkeypatch.setattr(server.method, "execute", endless)
    begun = time.monotonic()
    said = server.train(2)
    assert time.monotonic() - begun < 10
    assert said["refused"] == "policy.max_task_seconds = 0.5: the task took longer and was stopped"
    server.site.settings = server.settings
    again = server.ask("evaluate", part="test", after=0, values={})  # the method is built anew
    assert "error" in again or "values" in again
    assert server.train()["values"] == expected["values"]


def test_a_task_is_cancelled_by_the_sites_administrator(
    make: Make, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    server.begin(recipe)

    def cancelled(*_: Any) -> None:
        (server.own / CANCEL_FILE).touch()
        endless()

    (server.own / CANCEL_FILE).touch()  # of earlier: it cancels nothing
    assert "values" in server.train()
    monkeypatch.setattr(server.method, "execute", cancelled)
    assert server.train(2)["refused"] == "the task was cancelled by this site's administrator"
    assert not (server.own / CANCEL_FILE).exists()


def test_a_request_that_ends_the_process_is_not_asked_for_ever(
    make: Make, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make()
    server.begin(recipe)

    class Killed(BaseException):
        """The end of the process, without what a process does at its end."""

    def killed(*_: Any) -> None:
        raise Killed

    for _ in range(3):
        assert "values" in server.begin(recipe)
        monkeypatch.setattr(server.method, "execute", killed)
        monkeypatch.setattr(server.site.ledger, "finish", killed)
        with pytest.raises(Killed):
            server.train()
        server.restart()
    server.begin(recipe)
    assert server.train()["refused"] == "the request has ended this site's process 3 times"
    assert "values" in server.train(2)


# --- messages ---


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "\ud800"},
        {"kind": "\x1b[2J\x1b]0;owned\x07"},
        {"kind": ["work"]},
        {"kind": None},
        {"kind": "x" * 10**7},
        {"kind": "work\n{}"},
        {"run": "\udfff" * 16},
        {"run": "../../x"},
        {"round": "1"},
        {"round": "\ud800"},
        {"round": 1.0},
        {"round": True},
        {"round": -1},
        {"round": 10**30},
        {"round": [1]},
        {"task": "\ud800"},
        {"task": ["train"]},
        {"values": "\ud800"},
        {"values": [1]},
        {"keep": [1, "\ud800"]},
        {"keep": "all"},
        {"values": {"round": 1, "\ud800": "\ud800"}},
        {"values": {"round": "\ud800"}},
    ],
)  # fmt: skip
def test_a_message_of_garbage_is_a_reply_and_the_site_goes_on(
    make: Make, recipe: dict[str, Any], fields: dict[str, Any]
) -> None:
    """A surrogate in ``kind`` ended the process in its error path, and was asked again."""
    server = make()
    server.begin(recipe)
    before = server.site.ledger.total("rounds")
    message = {"kind": "work", "run": server.run, "task": "train", "round": 1, "values": {}, **fields}
    said = server.site.handle(message)
    assert said.keys() <= {"error", "refused"}
    assert json.loads(json.dumps(said)) == said
    assert server.site.outgoing == {}, "nothing is logged as sent"
    log = (server.own / "audit.jsonl").read_bytes()
    assert log.isascii()
    assert len(log) < 20_000
    events = [json.loads(line) for line in log.splitlines()]
    assert events[-1]["event"] in ("failed", "refused")
    assert all(character >= 32 or character == 10 for character in log)
    errors = (server.own / "errors.log").read_text() if (server.own / "errors.log").exists() else ""
    assert "\x1b" not in errors
    assert server.site.ledger.total("rounds") == before
    assert "values" in server.train(), "the run goes on"


@pytest.mark.parametrize("recipe_", ["/etc/hostname", "recipe.toml", None, 3, ["data"]])
def test_a_recipe_is_no_path(make: Make, recipe_: Any) -> None:
    server = make()
    assert server.ask("describe", values={"recipe": recipe_})["error"].startswith("a message's ")


# --- models ---


def test_a_folder_is_loaded_only_where_the_sites_file_lists_it(
    make: Make, recipe: dict[str, Any], tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe["model"]["base"]
    for name in (base, "~/model", "./model", "../model", "/", "model\0", "a/b/c", ""):
        with pytest.raises(PolicyError, match=r"policy\.base_models"):
            check_recipe(PolicySettings(), load_recipe(recipe, {"model.base": name}))
    monkeypatch.chdir(tmp_path)
    check_recipe(PolicySettings(), load_recipe(recipe, {"model.base": "org/model"}))
    (tmp_path / "org" / "model").mkdir(parents=True)  # a folder that has the form of a hub id
    with pytest.raises(PolicyError, match=r'base_models = \["org/model"\]'):
        check_recipe(PolicySettings(), load_recipe(recipe, {"model.base": "org/model"}))
    check_recipe(PolicySettings(), load_recipe(recipe, {"model.base": "builtin:minilm"}))
    assert "policy.base_models" in make(base_models=None).begin(recipe)["refused"]
    digest = folder_digest(Path(base))
    assert "values" in make(model_digests={base: digest}).begin(recipe)
    assert "policy.model_digests" in make(model_digests={base: "0" * 64}).begin(recipe)["refused"]
    other = tmp_path / "copy"
    other.mkdir()
    for file in Path(base).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert folder_digest(other) == digest
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert folder_digest(other) != digest


def test_another_recipe_under_the_name_of_a_run_makes_other_requests(
    make: Make, recipe: dict[str, Any]
) -> None:
    """The same words ask for something else then, so that rounds and evaluations count anew."""
    server = make(max_rounds=1)
    assert "values" in server.begin(recipe)
    first = server.train()
    assert "values" in first
    assert server.train()["values"] == first["values"], "the same request again is the same round"
    for changes in ({"seed": 7}, {"training": {**recipe["training"], "learning_rate": 0.5}}):
        assert "values" in server.begin({**recipe, **changes})
        assert "policy.max_rounds = 1" in server.train()["refused"]
    assert "values" in server.begin(recipe)
    assert server.train()["values"] == first["values"]


def test_evaluations_by_another_recipe_count_too(make: Make, recipe: dict[str, Any]) -> None:
    server = make(max_evaluations=1, rows=make_rows(120, 0))
    assert "values" in server.begin(recipe)
    assert "values" in server.evaluate()
    assert "values" in server.evaluate()
    assert "values" in server.begin({**recipe, "data": {**recipe["data"], "max_length": 8}})
    assert "policy.max_evaluations = 1" in server.evaluate()["refused"]


def test_a_site_does_not_open_the_servers_public_texts(
    make: Make, recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Of a prefix that the server distils: the path is the server's, whatever lies there at a site."""
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret\n")
    opened: list[str] = []
    plain = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        opened.append(str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    method = {"length": 4, "name": "prefix", "merging": "stacked", "compression": "distil"}
    for number, path in enumerate((str(secret), "/dev/zero", str(tmp_path / "none.txt"))):
        said = make().begin({**recipe, "method": {**method, "public_text": path}}, run=number)
        assert "values" in said
        assert path not in opened


BRED = {"template": "It is {label}", "labels": ["a", "b", "c"], "origin": "x"}


@pytest.mark.parametrize(
    "bred",
    [
        {**BRED, "template": "x" * 10_001},
        {**BRED, "template": "{label}" * 11},
        {**BRED, "template": "{labels}" * 11},
        {**BRED, "template": "{labels}" * 10, "labels": ["x" * 999] * 11},
        {**BRED, "template": "x" * 9_999 + "{label}", "labels": ["y"] * 1_001},
        {**BRED, "labels": ["x" * 1_001]},
        {**BRED, "labels": [3]},
        {**BRED, "labels": "abc"},
        {**BRED, "template": None},
        "x",
    ],
)
def test_a_state_to_evaluate_cannot_fill_the_memory_by_its_prompts(bred: Any) -> None:
    """What a task to score prompts may not hold, an evaluation may not either."""
    check_bred({"9": BRED})
    with pytest.raises(PolicyError, match="bred: "):
        check_bred({"9": bred})
    with pytest.raises(PolicyError, match="bred: "):
        check_bred([BRED])


@pytest.mark.parametrize(
    "method",
    [
        {"instructions": ["{input}" + "{labels}" * 11]},
        {"instructions": ["{input}", "{input}" + "x" * 10_001]},
        {"strategy": "in_context", "preamble": "{labels}" * 11},
        {"verbalisers": {"a": ["b", "x" * 1_001]}},
        {"synonyms": {"a": ["x" * 1_001]}},
    ],
)
def test_a_recipe_cannot_fill_the_memory_by_its_prompts(method: dict[str, Any]) -> None:
    policy = PolicySettings(logits=True)
    sound = {"instructions": ["{input} is one of {labels}"], "verbalisers": {"a": "b"}}
    check_recipe(policy, load_recipe({"method": {"name": "prompt_engineering", **sound}}))
    with pytest.raises(PolicyError, match="method"):
        check_recipe(policy, load_recipe({"method": {"name": "prompt_engineering", **method}}))
