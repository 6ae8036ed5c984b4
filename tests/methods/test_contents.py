"""What answers hold: every task says it, and every method says what a recipe with it needs."""

from __future__ import annotations

import pytest

from fedcustom.core.errors import PolicyError
from fedcustom.methods import Task, registry
from fedcustom.methods.contents import CONTENTS, MEANING
from fedcustom.methods.distillation import messages as distillation
from fedcustom.methods.prompt_engineering import messages as prompt_engineering
from fedcustom.methods.retrieval import messages as retrieval
from fedcustom.methods.retrieval.checks import check_search
from fedcustom.methods.retrieval.messages import AnswerTask, CalibrateTask, FetchTask, RetrieveTask
from fedcustom.methods.retrieval.settings import RetrievalSettings
from fedcustom.methods.tuning import messages as tuning
from fedcustom.methods.untuned import messages as untuned
from fedcustom.training.settings import TrainingSettings

TASKS = [
    pair.task
    for messages in (
        *(tuning.MESSAGES, tuning.SUMMED_KINDS, distillation.MESSAGES, retrieval.MESSAGES),
        *(prompt_engineering.SELECTION, prompt_engineering.IN_CONTEXT, prompt_engineering.BLACK_BOX),
        untuned.SHOTS,
    )
    for pair in messages.values()
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_every_task_says_what_its_answer_holds(task: type[Task]) -> None:
    assert "contents" in vars(task)
    assert 0 < len(task.contents) < len(CONTENTS)
    assert set(task.contents) <= MEANING.keys()


@pytest.mark.parametrize("name", registry.names())
def test_every_method_says_what_it_needs(name: str) -> None:
    method = registry.settings_of(name)(name=name)
    for task in method.tasks:
        needed = method.needed_contents(TrainingSettings(fit_head_rounds=[1]), task)
        assert "counts" in needed
        assert needed.keys() < set(CONTENTS)
        assert ("updates" in needed) == (method.sends_weights and not method.only_fits)


ENCODER = "ab" * 32


@pytest.mark.parametrize(("task", "reason"), [
    (RetrieveTask(encoder=ENCODER, top=6), "top = 6: the recipe says method.top = 5"),
    (RetrieveTask(encoder=ENCODER, top=5, texts=["a"]), "texts: the recipe says method.search = 'vector'"),
    (FetchTask(encoder=ENCODER, documents=list("abcdef")), "at most 5 in an answer"),
    (FetchTask(encoder=ENCODER, documents=[]), "at most 5 in an answer"),
    (AnswerTask(encoder=ENCODER, question="?", documents=list("abcd")), "at most 3 in an answer"),
    (FetchTask(encoder=ENCODER, documents=["a", "a"]), "named twice"),
    (CalibrateTask(own=0), "own: must be the number of a client"),
])  # fmt: skip
def test_a_search_asks_for_no_more_than_the_recipe(task: Task, reason: str) -> None:
    settings = RetrievalSettings(top=5)
    with pytest.raises(PolicyError, match=reason):
        check_search(settings, task)
    check_search(settings, RetrieveTask(encoder=ENCODER, top=5))
    check_search(settings, FetchTask(encoder=ENCODER, documents=["a"]))
