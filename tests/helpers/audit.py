"""Runs that are audited, in memory: targets with tiny models, and rounds of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcustom.audit.attack import Deadline, Received, RoundView, Target
from fedcustom.audit.results import Finding, NotRun
from fedcustom.data.examples import ClientData, Example, FederatedData, LearningTask
from fedcustom.methods import Answer, Client, State, WeightTuning, Work
from fedcustom.methods.protocol import UNFINISHED
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import LABELS, make
from helpers.rows import make_rows

PER_CLIENT = 4
CLIENTS = 20
LATER = Deadline(float("inf"))


def examples(count: int, kind: str = "classification") -> list[Example]:
    """Examples of which no two have one text."""
    rows = {row["text"]: row for row in make_rows(4 * count, 3)}
    if kind == "classification":
        found = [Example(text, label=LABELS.index(row["label"])) for text, row in rows.items()]
    else:
        found = [Example(text, target=f" {row['label']}") for text, row in rows.items()]
    return found[:count]


def target(
    folder: str,
    method: str,
    task: str = "classification",
    /,
    *,
    per_client: int = PER_CLIENT,
    held: int = 0,
    recipe: dict[str, Any] | None = None,
    **settings: Any,
) -> Target:
    """Twenty clients of so many texts each, iid; ``held`` are texts of the development split, ``recipe`` has
    further sections.
    """
    pool = examples(CLIENTS * per_client + held, task)
    parts = {f"c{n:02}": pool[per_client * n : per_client * (n + 1)] for n in range(CLIENTS)}
    training = settings.pop("training", {})
    built = make(folder, method, task, clients=CLIENTS, training=training, **settings)
    classes = task == "classification"
    complete = load_recipe(
        {
            "model": {"base": folder},
            "data": {
                "source": "x.jsonl",
                **({} if classes else {"task": task, "prompt": "{source}", "target": "t"}),
            },
            "clients": {"partition": "iid", "count": CLIENTS},
            "method": {"name": method},
            **(recipe or {}),
        }
    )
    clients = {name: ClientData(name, part) for name, part in parts.items()}
    data = FederatedData(
        LearningTask(task, LABELS if classes else ()), clients, pool[CLIENTS * per_client :], [], False
    )
    return Target(complete, data, built)


def seen(target: Target, number: int, names: list[str], before: State | None = None) -> RoundView:
    """A round of these clients, from the first state unless told otherwise, with all its exchanges."""
    method = target.method
    assert isinstance(method, WeightTuning)
    before = state = before or method.initialise()
    clients = {name: Client(name, target.data.clients[name]) for name in names}
    messages: list[Received] = []
    while True:
        tasks = method.configure(state, number, {name: Work(epochs=1) for name in names})
        answers = [Answer(name, task, method.execute(task, clients[name])) for name, task in tasks.items()]
        messages += [Received(a.client, a.task, a.update) for a in answers]
        state = method.aggregate(state, answers).state
        if UNFINISHED not in state.values:
            break
    kind = "fitting the head" if number in method.server.parts.head_rounds else "training"
    return RoundView(number, kind, before, state, messages, names)  # type: ignore[arg-type]


def by_measure(every: Sequence[Finding | NotRun]) -> dict[str, Finding]:
    """Findings by view and measure, whose figures are in order."""
    found = [each for each in every if isinstance(each, Finding)]
    assert all(0 <= f.success <= 1 for f in found)
    assert all(f.low is None or f.high is None or f.low <= f.success <= f.high for f in found)
    return {f"{f.view}: {f.measure}": f for f in found}
