"""Tasks and updates as JSON: every class there and back, and what is refused on the way in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Annotated, Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from fedcustom.core.errors import UpdateError, WireError
from fedcustom.methods import RoundTask, Task, Update, Work, message_kinds
from fedcustom.methods.distillation.messages import DistilTask, DistilUpdate
from fedcustom.methods.lora import messages as lora
from fedcustom.methods.messages import Messages, typed
from fedcustom.methods.prefix.messages import PrefixUpdate
from fedcustom.methods.prompt_engineering.messages import (
    AloneTask,
    AloneUpdate,
    AnswerQueriesTask,
    AnswerQueriesUpdate,
    ScoreTask,
    ScoreUpdate,
    SearchTask,
    SearchUpdate,
)
from fedcustom.methods.retrieval import messages as retrieval
from fedcustom.methods.tuning import messages as tuning
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.methods.untuned.messages import ShotsTask, ShotsUpdate
from fedcustom.transport import wire
from fedcustom.transport.channel import task_length, update_length
from fedcustom.transport.messages import read_task, read_update, values_of

MODULES = ("tuning", "lora", "prefix", "distillation", "retrieval", "prompt_engineering", "untuned")

# --- every class, with any values that it allows ---

finite = st.floats(-1e30, 1e30)
whole, positive = st.integers(0, 2**53 - 1), st.integers(1, 2**53 - 1)
rounds = st.integers(1, 2**31 - 1)
clean = st.characters(codec="utf-8", exclude_categories=["Cc"])
texts = st.lists(st.text(clean, max_size=5), max_size=3)
digests = st.text("0123456789abcdef", min_size=12, max_size=20)
works = st.builds(
    Work,
    epochs=st.none() | st.floats(1e-3, 1e3) | st.integers(1, 9),
    steps=st.none() | positive,
    examples=st.none() | positive,
    batches=st.none() | positive,
)
bred = st.dictionaries(
    st.integers(0, 9).map(str),
    st.fixed_dictionaries({"template": st.text(clean), "labels": texts, "origin": st.text(clean)}),
    max_size=2,
)
tallies = st.dictionaries(st.integers(0, 9).map(str), st.tuples(positive, finite, finite), max_size=3)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": st.text(clean, max_size=5)}
)
shots = st.lists(
    st.fixed_dictionaries({"messages": st.lists(turns, min_size=1, max_size=2), "answer": st.text(clean)}),
    max_size=2,
)
asked = {"round_number": rounds}
paced = {**asked, "learning_rate_factor": finite, "work": works}
trained = {"weight": finite, "loss": finite, "examples": positive, "steps": positive}

MESSAGES: dict[type[Task], tuple[dict[str, Any], type[Update], dict[str, Any]]] = {
    TrainTask: (
        {
            **paced,
            "label_counts": st.none() | st.lists(whole, max_size=3).map(tuple),
            "head_unfitted": st.booleans(),
        },
        TrainUpdate,
        trained,
    ),
    lora.ProjectTask: (asked, lora.ProjectionUpdate, {}),
    tuning.FitHeadTask: (
        paced,
        tuning.HeadSumsUpdate,
        {"weight": finite, "deviation": st.none() | finite},
    ),
    tuning.ScaleHeadTask: (asked, tuning.HeadLossesUpdate, {"weight": finite}),
    tuning.HeadGradientTask: (asked, tuning.HeadGradientUpdate, {"weight": finite, "objective": finite}),
    tuning.CountLabelsTask: (paced, tuning.LabelCountsUpdate, {"weight": finite}),
    tuning.SumNoisedTask: (paced, tuning.NoisedSumsUpdate, {"weight": finite}),
    tuning.SumVectorsTask: (
        {**asked, **dict.fromkeys(("counted", "needed", "owners"), st.lists(whole, max_size=3).map(tuple))},
        tuning.VectorSumsUpdate,
        {"weight": finite},
    ),
    tuning.SumLossesTask: ({**asked, "examples": positive}, tuning.LossSumsUpdate, {"weight": finite}),
    tuning.SumGradientsTask: (
        {**asked, "examples": positive, "step": st.integers(1, 1000)},
        tuning.GradientSumsUpdate,
        {"weight": finite},
    ),
    DistilTask: ({**paced, "model": whole}, DistilUpdate, trained),
    retrieval.CountTask: (asked, retrieval.CountUpdate, {"documents": whole}),
    retrieval.IndexTask: ({"encoder": digests}, retrieval.IndexUpdate, {"documents": whole, "chunks": whole}),
    retrieval.RouteTask: ({}, retrieval.RouteUpdate, {"questions": positive}),
    retrieval.CalibrateTask: ({"own": whole}, retrieval.CalibrateUpdate, {}),
    retrieval.RetrieveTask: (
        {"encoder": digests, "top": st.integers(1, 1000), "texts": st.none() | texts},
        retrieval.RetrieveUpdate,
        {"weight": finite},
    ),
    retrieval.FetchTask: (
        {"encoder": digests, "documents": texts},
        retrieval.FetchUpdate,
        {"passages": st.dictionaries(st.text(clean, max_size=3), st.text(clean, max_size=3), max_size=3)},
    ),
    retrieval.AnswerTask: (
        {"encoder": digests, "question": st.text(clean), "documents": texts},
        retrieval.AnswerUpdate,
        {"answer": st.text(clean)},
    ),
    ScoreTask: (
        {**asked, "work": works, "candidates": st.lists(whole, max_size=3), "bred": bred},
        ScoreUpdate,
        {"weight": finite, "tallies": tallies, "examples": positive},
    ),
    AnswerQueriesTask: (
        {**asked, "queries": whole, "answers": texts},
        AnswerQueriesUpdate,
        {"weight": finite, "examples": positive, "answers": st.none() | texts},
    ),
    SearchTask: (
        {**asked, "sigma": finite},
        SearchUpdate,
        {"weight": finite, "loss": finite, "examples": positive, "sigma": finite},
    ),
    AloneTask: (asked, AloneUpdate, {"examples": positive}),
    ShotsTask: (asked, ShotsUpdate, {"weight": finite, "examples": positive, "shots": shots}),
}
"""By task: the fields that it takes, the update that answers it, and that one's fields."""

PAIRS = {**MESSAGES, RoundTask: ({}, PrefixUpdate, {**trained, "layers": st.lists(whole, max_size=3)})}


def strategy(message: type[Any], given_fields: dict[str, Any]) -> Any:
    made = st.builds(message, **given_fields)
    names = {each.name for each in fields(message)} - {"tensors", "weight"}
    assert names <= given_fields.keys(), "the strategy leaves out a field"
    return made


tasks = st.one_of(
    st.tuples(strategy(task, there), st.just(update), strategy(update, back))
    for task, (there, update, back) in MESSAGES.items()
)


def kinds(task: Task, update: type[Update]) -> Messages:
    return message_kinds((type(task), update))


def through_the_wire(values: dict[str, Any]) -> Any:
    return wire.decode(wire.encode({"w": torch.ones(2)}, values))


def encodable(values: Any) -> bool:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except ValueError:  # half a surrogate pair is no text in UTF-8
        return False
    return True


def subclasses(base: type[Any]) -> set[type[Any]]:
    return {base}.union(*(subclasses(each) for each in base.__subclasses__()))


def test_every_class_is_tried() -> None:
    """Of the methods; bases of theirs have no kind, and an encoded update holds another one."""
    for module in MODULES:
        import_module(f"fedcustom.methods.{module}.messages")
    every, bases = subclasses(Task) | subclasses(Update), Task.__module__
    ours = {each for each in every if ".messages" in each.__module__ and each.__module__ != bases}
    named = {each for each in ours if not issubclass(each, Task) or "kind" in vars(each)}
    assert named == set(MESSAGES) | {update for _, update, _ in PAIRS.values()}


@given(tasks)
@settings(deadline=None)  # a class's check is built when it is first used
def test_there_and_back(sample: Any) -> None:
    """Equal field by field, the tensors beside; and as long as was counted."""
    task, kind, update = sample
    if not encodable([values_of(task), values_of(update)]):
        return
    messages = kinds(task, kind)
    tensors, values = through_the_wire({"kind": task.kind, **values_of(task)})
    back = read_task(messages, values.pop("kind"), values, tensors)
    assert type(back) is type(task)
    assert back.tensors is tensors
    assert {**vars(back), "tensors": {}} == {**vars(task), "tensors": {}}
    tensors, values = through_the_wire(values_of(update))
    answer = read_update(messages, task, values, tensors)
    assert type(answer) is kind
    assert {**vars(answer), "tensors": {}} == {**vars(update), "tensors": {}}
    assert update_length(update) == len(wire.encode({}, values_of(update)))
    assert task_length(task) == len(wire.encode({}, {"kind": task.kind, **values_of(task)}))


@given(strategy(PrefixUpdate, PAIRS[RoundTask][2]))
@settings(deadline=None)
def test_a_method_with_an_update_of_its_own(update: PrefixUpdate) -> None:
    messages = message_kinds((TrainTask, PrefixUpdate))
    back = read_update(messages, TrainTask(round_number=1), through_the_wire(values_of(update))[1])
    assert vars(back) == vars(update)
    with pytest.raises(WireError, match=r"answer to 'train': unknown key 'layers'"):
        read_update(tuning.MESSAGES, TrainTask(round_number=1), values_of(update))


def test_the_json_is_that_of_before() -> None:
    """The keys that travelled when messages were dictionaries."""
    amount = Work(epochs=1, batches=4)
    task = TrainTask(round_number=3, learning_rate_factor=0.5, work=amount, label_counts=(2, 0))
    assert values_of(task) == {
        "round": 3, "learning_rate_factor": 0.5, "epochs": 1, "batches": 4, "label_counts": [2, 0],
    }  # fmt: skip
    unfitted = TrainTask(round_number=1, work=Work(steps=2), head_unfitted=True)
    assert values_of(unfitted) == {"round": 1, "learning_rate_factor": 1.0, "steps": 2, "head_unfitted": True}
    assert json.dumps(values_of(TrainTask(round_number=1, work=amount))).count('"epochs": 1,') == 1
    assert values_of(tuning.ScaleHeadTask(round_number=2)) == {"round": 2}
    update = TrainUpdate({}, 8.0, loss=1.5, examples=8, steps=1)
    assert values_of(update) == {"weight": 8.0, "loss": 1.5, "examples": 8, "steps": 1}
    assert values_of(tuning.HeadSumsUpdate()) == {"weight": 1.0}
    query = retrieval.RetrieveTask(encoder=12 * "a", top=3)
    assert values_of(query) == {"encoder": 12 * "a", "top": 3}
    scored = ScoreUpdate(tallies={"4": (6, 5, -1.5)}, examples=6)
    assert values_of(scored) == {"weight": 1.0, "tallies": {"4": [6, 5, -1.5]}, "examples": 6}


# --- what is refused ---

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value can be changed."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The value with ``new`` at a place; the constant DROP takes a key away."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is DROP and len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


DROP = object()


def read_or_refused(
    messages: Messages, task: Task, values: Any, *, answer: bool
) -> tuple[Task | Update | None, str]:
    try:
        if answer:
            return read_update(messages, task, values), ""
        return read_task(messages, task.kind, values), ""
    except WireError as error:
        return None, str(error)


@given(tasks, st.data())
@settings(max_examples=150, deadline=None)
def test_changed_json_is_read_or_refused_in_one_line(sample: Any, data: Any) -> None:
    """With WireError and nothing else; what is read is written as it was."""
    task, kind, update = sample
    messages = kinds(task, kind)
    for message in (task, update):
        values = json.loads(json.dumps(values_of(message)))
        path = data.draw(st.sampled_from(places(values)))
        action = data.draw(st.sampled_from(["replace", "drop", "add"]))
        if action == "drop" and path:
            values = changed(values, path, DROP)
        elif action == "add" and isinstance(values, dict):
            values = {**values, data.draw(st.text(max_size=8)): data.draw(junk)}
        else:
            values = changed(values, path, data.draw(junk))
        back, refusal = read_or_refused(messages, task, values, answer=message is update)
        if back is not None:
            assert set(values_of(back)) <= set(values)
        else:
            assert refusal.startswith((f"task {task.kind!r}: ", f"answer to {task.kind!r}: "))
            assert len(refusal.splitlines()) == 1
            assert refusal.isascii()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": None}, "round: input should be a valid integer"),
        ({"round": True}, "round: input should be a valid integer"),
        ({"round": 1.0}, "round: input should be a valid integer"),
        ({"round": "1"}, "round: input should be a valid integer"),
        ({"round": 0}, "round: input should be greater than or equal to 1"),
        ({"round": 2**31}, "round: input should be less than"),
        ({"round": 10**4000}, "round: "),
        ({"round": DROP}, "round is missing"),
        ({"learning_rate_factor": DROP}, "learning_rate_factor is missing"),
        ({"learning_rate_factor": math.nan}, "learning_rate_factor: input should be a finite number"),
        ({"learning_rate_factor": math.inf}, "learning_rate_factor: input should be a finite number"),
        ({"learning_rate_factor": 10**400}, "learning_rate_factor: "),
        ({"learning_rate_factor": "1"}, "learning_rate_factor: input should be a valid number"),
        ({"learning_rate_factor": False}, "learning_rate_factor: input should be a valid number"),
        ({"epochs": 0}, "epochs: input should be greater than 0"),
        ({"epochs": None}, "epochs: input should be a valid number"),
        ({"steps": -1}, "steps: input should be greater than or equal to 1"),
        ({"batches": 2**53}, "batches: input should be less than"),
        ({"head_unfitted": 1}, "head_unfitted: input should be a valid boolean"),
        ({"head_unfitted": None}, "head_unfitted: input should be a valid boolean"),
        ({"label_counts": 3}, "label_counts: input should be a valid"),
        ({"label_counts": {"0": 1}}, "label_counts: input should be a valid"),
        ({"label_counts": [1, True]}, r"label_counts\.1: input should be a valid integer"),
        ({"label_counts": [-1]}, r"label_counts\.0: input should be greater than or equal to 0"),
        ({"label_counts": 1_000_001 * [0]}, "label_counts: .* at most 1000000 items"),
        ({"label_counts": [[[0]]]}, r"label_counts\.0: input should be a valid integer"),
        ({"epoch": 1}, "unknown key 'epoch'; allowed: .*; did you mean 'epochs'"),
        ({"kind": "train"}, "unknown key 'kind'"),
        ({"work": {"epochs": 1}}, "unknown key 'work'"),
        ({"tensors": {}}, "unknown key 'tensors'"),
        ({"round_number": 1}, "unknown key 'round_number'"),
        ({"\ud800\n": 1}, r"unknown key '\\ud800\\n'"),
    ],
)
def test_a_task_that_is_none(change: dict[str, Any], message: str) -> None:
    sound = {"round": 1, "learning_rate_factor": 1.0, "epochs": 1}
    read_task(tuning.MESSAGES, "train", sound)
    values = {key: value for key, value in {**sound, **change}.items() if value is not DROP}
    with pytest.raises(WireError, match=rf"^task 'train': {message}") as caught:
        read_task(tuning.MESSAGES, "train", values)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": DROP}, "weight is missing"),
        ({"weight": "8"}, "weight: input should be a valid number"),
        ({"weight": True}, "weight: input should be a valid number"),
        ({"weight": math.nan}, "weight: input should be a finite number"),
        ({"loss": None}, "loss: input should be a valid number"),
        ({"loss": -math.inf}, "loss: input should be a finite number"),
        ({"loss": [1.0]}, "loss: input should be a valid number"),
        ({"steps": 2.5}, "steps: input should be a valid integer"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1"),
        ({"examples": 2**53}, "examples: input should be less than"),
        ({"accuracy": 1.0}, "unknown key 'accuracy'"),
    ],
)
def test_an_update_that_is_none(change: dict[str, Any], message: str) -> None:
    sound = {"weight": 8.0, "loss": 1.5, "examples": 8, "steps": 1}
    task = TrainTask(round_number=1)
    read_update(tuning.MESSAGES, task, sound)
    values = {key: value for key, value in {**sound, **change}.items() if value is not DROP}
    with pytest.raises(WireError, match=rf"^answer to 'train': {message}"):
        read_update(tuning.MESSAGES, task, values)


@pytest.mark.parametrize("kind", ["retrieve", "", "train ", None, 3, ["train"], "x\ud800" * 99])
def test_a_kind_that_the_method_has_not(kind: Any) -> None:
    with pytest.raises(
        WireError, match="the run's method has no such task; allowed: train, fit head"
    ) as error:
        read_task(tuning.MESSAGES, kind, {"round": 1})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("values", [None, [], "x", 3, [["round", 1]]])
def test_values_that_are_no_object(values: Any) -> None:
    with pytest.raises(WireError, match="task 'scale head': its values must be a JSON object"):
        read_task(tuning.MESSAGES, "scale head", values)


def test_values_nested_without_end() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError, match=r"^task 'train': "):
        read_task(tuning.MESSAGES, "train", {"round": deep, "learning_rate_factor": 1.0})


def test_nested_values_are_checked_too() -> None:
    row = {"template": "{label}", "labels": ["a"], "origin": "given"}
    sound = {"round": 1, "candidates": [7], "bred": {"7": row}}
    messages = message_kinds((ScoreTask, ScoreUpdate))
    assert typed(read_task(messages, "score", sound), ScoreTask).bred["7"] == row
    for change in ({"labels": "a"}, {"labels": [1]}, {"origin": None}, {"more": 1}):
        with pytest.raises(WireError, match=rf"^task 'score': bred\.7\.{next(iter(change))}"):
            read_task(messages, "score", {**sound, "bred": {"7": {**row, **change}}})
    for key in row:
        less = {name: value for name, value in row.items() if name != key}
        with pytest.raises(WireError, match=rf"^task 'score': bred\.7\.{key}"):
            read_task(messages, "score", {**sound, "bred": {"7": less}})
    task = typed(read_task(messages, "score", sound), ScoreTask)
    for tally in ([1, 0.0], [1, 0.0, 0.0, 0.0], [True, 0.0, 0.0], [1.5, 0.0, 0.0], [1, "0", 0.0], {}):
        with pytest.raises(WireError, match=r"^answer to 'score': tallies\.7"):
            read_update(messages, task, {"weight": 1.0, "examples": 1, "tallies": {"7": tally}})


# --- classes of another package ---


@dataclass(frozen=True, kw_only=True)
class PollTask(RoundTask):
    kind: ClassVar[str] = "poll"
    exact_answer: ClassVar[bool] = True

    question: Annotated[str, Field(max_length=20)]
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class PollUpdate(Update):
    votes: dict[str, int]


def test_a_third_partys_messages() -> None:
    messages = {**tuning.MESSAGES, **message_kinds((PollTask, PollUpdate))}
    task = PollTask(round_number=2, question="?")
    assert values_of(task) == {"round": 2, "question": "?"}
    assert read_task(messages, "poll", values_of(task)) == task
    update = PollUpdate(votes={"yes": 3})
    assert read_update(messages, task, values_of(update)) == update
    with pytest.raises(WireError, match=r"answer to 'poll': votes\.yes"):
        read_update(messages, task, {"weight": 1.0, "votes": {"yes": 3.5}})
    with pytest.raises(WireError, match=r"task 'poll': question: .* at most 20 characters"):
        read_task(messages, "poll", {"round": 2, "question": 21 * "?"})
    with pytest.raises(ValueError, match="two tasks of kind 'poll'"):
        message_kinds((PollTask, PollUpdate), (PollTask, Update))
    with pytest.raises(UpdateError, match="a message is PollTask, not TrainTask"):
        typed(task, TrainTask)
