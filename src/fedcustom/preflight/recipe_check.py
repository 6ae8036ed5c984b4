"""The check of a recipe: everything that a run does before its first round, and what it shows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..core import environment
from ..core.errors import PolicyError
from ..deployment.site.policy import check_recipe, needed_policy
from ..deployment.site.settings import PolicySettings
from ..federated.callbacks import Callback
from ..federated.cost_estimate import outline
from ..federated.resolve import resolved
from ..federated.resources import resources_of, untrained
from ..federated.schedule import Plan, plan_rounds
from ..federated.simulation import Federation, simulate
from ..methods import WeightTuning, client_labels
from ..methods.settings import TuningSettings
from ..recipe.paths import absolute
from ..recipe.recipe import Recipe, load_recipe
from .clients import client_sizes
from .examples import shown_examples
from .messages import message_kinds
from .report import MessageKind, RecipeCheck

EXAMPLES = 3


class _Told(Callback):
    """Passes on what is being done, and keeps the remarks of a run."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.notes = callback, list[str]()

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        self.callback.on_phase(text, done, of)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def check(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    examples: int = EXAMPLES,
    measure: bool = True,
    callbacks: Callback | None = None,
) -> RecipeCheck:
    """What a recipe resolves to: its complete settings, rows, clients, some examples with the tokens that are
    learnt, what is cut, what is sent, what a site has to allow, and what the run costs. Nothing is kept, and
    nothing is sent.

    Args:
        recipe: as :func:`fedcustom.run` takes it.
        overrides: settings in place of the recipe's, likewise.
        examples: how many training examples are shown.
        measure: whether memory and time are estimated, for which the clients of a round train two steps that
            are thrown away.
        callbacks: is told of what is being done.

    Raises:
        FedcustomError: as a run of the recipe would before its first round.
    """
    given = load_recipe(recipe, overrides)
    complete = absolute(resolved(given))
    told = _Told(callbacks or Callback())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        environment.restart_peak_memory()
        federation = simulate(complete, place, place / "clients", told)
        with ExitStack() as ending:
            ending.callback(federation.close)
            settled = complete.settled(len(federation.data.clients))
            found = _checked(given, settled, federation, examples)
            if not measure:
                found["inapplicable"]["resources"] = "was not asked for"
            elif isinstance(federation.method, WeightTuning):
                found["resources"] = resources_of(complete, federation, told)
            else:
                found["inapplicable"]["resources"] = untrained(complete)
    told.on_phase("")
    return RecipeCheck(**found, notes=tuple(told.notes))


def _checked(given: Recipe, recipe: Recipe, federation: Federation, examples: int) -> dict[str, Any]:
    data, base, reasons = federation.data, federation.base, dict[str, str]()
    turns = federation.private.turns() if federation.private else None
    plan = plan_rounds(recipe, data, client_labels(federation.origin), turns)
    cost = outline(recipe, data, federation.method, federation.origin, plan)
    learns = recipe.method.sends_predictions or (
        isinstance(recipe.method, TuningSettings) and not recipe.method.only_fits
    )
    shown = shown_examples(data, recipe.data, base, examples, learns=learns)
    if not any(example.trained for example in shown):
        reasons["examples"] = _why_unmarked(recipe, learns)
    if recipe.data.task != "classification":
        reasons["labels"] = f"data.task = {recipe.data.task!r}: there are no labels"
    messages, policy, refused = _sent(recipe, federation, plan, cost, reasons)
    train = sum(len(client.train) for client in data.clients.values())
    rows = {"train": train, "development": len(data.development), "test": len(data.test)}
    if data.public:
        rows["public"] = len(data.public)
    return {
        "settings": recipe.model_dump(mode="json", exclude_none=True),
        "filled": _filled(given, recipe),
        "rows": rows,
        "test_is_pooled": data.test_is_pooled,
        "clients": client_sizes(data),
        "cuts": federation.truncation,
        "examples": tuple(shown),
        "messages": tuple(messages),
        "policy": tuple(policy),
        "refused": refused,
        "outline": cost,
        "resources": None,
        "inapplicable": reasons,
    }


def _sent(
    recipe: Recipe, federation: Federation, plan: Plan, cost: Any, reasons: dict[str, str]
) -> tuple[list[MessageKind], list[Any], str | None]:
    """Messages, what a policy must allow for them, and why no policy does."""
    if recipe.baseline != "federated":
        reasons["messages"] = reasons["policy"] = f"baseline = {recipe.baseline!r}: nothing is sent"
        return [], [], None
    messages, unknown = message_kinds(recipe, federation, plan, cost)
    if unknown is not None:
        reasons["bytes"] = unknown
    policy = needed_policy(recipe)
    try:
        check_recipe(PolicySettings.model_validate({need.setting: need.value for need in policy}), recipe)
    except PolicyError as error:
        return messages, policy, str(error)
    return messages, policy, None


def _why_unmarked(recipe: Recipe, learns: bool) -> str:
    if recipe.data.task == "classification" and learns:
        return "a classifier learns labels: no token is marked"
    if recipe.data.task == "retrieval":
        return "retrieval learns no tokens: no token is marked"
    return f"method.name = {recipe.method.name!r}: learns no tokens: none is marked"


def _filled(given: Recipe, recipe: Recipe) -> dict[str, Any]:
    """Settings, by their dotted names, that are other than the recipe says."""
    before, after = (_flat(one.model_dump(mode="json")) for one in (given, recipe))
    paths = {"model.base", "data.source", "public.source", "data.chat_template"}
    return {key: value for key, value in after.items() if value != before.get(key) and key not in paths}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
