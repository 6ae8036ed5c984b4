"""Policy checks of a site: of a recipe before anything is loaded, of each request before it is executed, and
of each message before it leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import PolicyError
from ...data.settings import is_template
from ...methods.contents import MEANING, Content
from ...recipe.recipe import Recipe
from .ledger import Count, Ledger
from .models import check_model, is_local
from .privacy import check_privacy
from .request import Request
from .settings import PolicySettings

MEGABYTE = 1e6

TASKS_PER_ROUND = 4
"""Most tasks answered for each round: one is sent again when a job ends, and some methods need several."""

TASKS_BESIDE_ROUNDS = 8
"""Tasks of a run that belong to no round: clients of retrieval index their documents, say."""

MAX_ATTEMPTS = 3
"""How often a request may end this site's process before it is refused."""

MAX_CLIENTS, MAX_CLIENT_NAME = 10_000, 100


def check_recipe(policy: PolicySettings, recipe: Recipe) -> None:
    """Refuse a recipe that the site takes no part in.

    Raises:
        PolicyError: names the setting of the policy, and what it allows.
    """
    if policy.methods is not None and recipe.method.name not in policy.methods:
        raise PolicyError(
            f"policy.methods: method {recipe.method.name!r} is not allowed here; allowed: "
            f"{', '.join(policy.methods) or 'none'}"
        )
    for name, revision in models_of(recipe):
        check_model(name, revision, policy.base_models, policy.model_digests)
    if setting := recipe.method.opens_file:
        raise PolicyError(f"{setting}: a site opens no files that a recipe names")
    if recipe.model.trust_remote_code:
        raise PolicyError("model.trust_remote_code = true: a site runs no code that a recipe brings")
    if (template := recipe.data.chat_template) is not None:
        if not is_template(template):
            raise PolicyError("data.chat_template: a site opens no files that a recipe names")
        if not policy.chat_templates:
            raise PolicyError(
                "policy.chat_templates = false: the recipe brings a chat template (data.chat_template); "
                "allow it in [policy] of site.toml by chat_templates = true"
            )
    if policy.secure_sums and not (recipe.secure_sum is not None and recipe.secure_sum.on):
        raise PolicyError(
            "policy.secure_sums = true: the recipe lets the server see each site's change; it needs "
            "secure_sum.on = true"
        )
    recipe.method.check_limits()
    for content, setting in recipe.method.needed_contents(recipe.training, recipe.data.task).items():
        check_content(policy, [content], f"{setting} in the recipe")
    trains = "training" not in recipe.method.not_for and not recipe.method.one_round
    if trains and recipe.training.batch_size < policy.least_batch_size:
        raise PolicyError(
            f"policy.least_batch_size = {policy.least_batch_size}: the recipe says training.batch_size = "
            f"{recipe.training.batch_size}"
        )
    if trains and recipe.training.local_steps and recipe.training.local_steps < policy.least_steps:
        raise PolicyError(
            f"policy.least_steps = {policy.least_steps}: the recipe says training.local_steps = "
            f"{recipe.training.local_steps}"
        )
    check_privacy(policy, recipe)


@dataclass(frozen=True)
class PolicyNeed:
    """A line that ``[policy]`` of a ``site.toml`` must have for a recipe, which by default it has not: the
    setting, the value that allows the recipe, and the recipe's setting that asks for it.
    """

    setting: str
    value: bool | int | list[str]
    reason: str


def needed_policy(recipe: Recipe) -> list[PolicyNeed]:
    """What a site has to allow beyond its defaults to take part in a complete recipe. What no policy allows
    is left to :func:`check_recipe`.
    """
    default, found = PolicySettings(), list[PolicyNeed]()
    for content, setting in recipe.method.needed_contents(recipe.training, recipe.data.task).items():
        if not getattr(default, content):
            found.append(PolicyNeed(content, True, f"{setting} sends {MEANING[content]}"))
    template = recipe.data.chat_template
    if template is not None and is_template(template):
        found.append(PolicyNeed("chat_templates", True, "data.chat_template"))
    names = [f"{name}@{revision}" if revision else name for name, revision in models_of(recipe)]
    if any(is_local(name) for name, _ in models_of(recipe)):
        found.append(PolicyNeed("base_models", names, "model.base is a folder"))
    trains = "training" not in recipe.method.not_for and not recipe.method.one_round
    for setting, asked in (
        ("least_batch_size", recipe.training.batch_size),
        ("least_steps", recipe.training.local_steps),
    ):
        if trains and asked is not None and asked < getattr(default, setting):
            key = "batch_size" if setting == "least_batch_size" else "local_steps"
            found.append(PolicyNeed(setting, asked, f"training.{key} = {asked}"))
    return found


def models_of(recipe: Recipe) -> list[tuple[str, str | None]]:
    """Every pretrained model that a recipe names, with the revision that it asks for."""
    named = [
        (recipe.model.base, recipe.model.revision),
        *((name, None) for name in recipe.method.named_models),
    ]
    return [(name, revision) for name, revision in named if name is not None]  # "" is this folder


def check_content(policy: PolicySettings, contents: Iterable[Content], what: str) -> None:
    """Refuse ``what`` where it would send content that the site has not chosen to give.

    Raises:
        PolicyError: names the line of ``site.toml`` that would allow it.
    """
    for content in contents:
        if not getattr(policy, content):
            hint = (
                " (and training.logit_adjustment = 0 in the recipe does without)" if content == "sums" else ""
            )
            raise PolicyError(
                f"policy.{content} = false: {what} needs {MEANING[content]}; allow it in [policy] of "
                f"site.toml by {content} = true{hint}"
            )


def check_opening(names: Any, labels: Any, most_labels: int) -> tuple[list[str], list[str]]:
    """The names of a run's clients and its labels, as the server tells them.

    Raises:
        PolicyError: there are too many, or they are no short texts that differ.
    """
    for key, value, most, longest in (
        ("names", names, MAX_CLIENTS, MAX_CLIENT_NAME),
        ("labels", labels, most_labels, MAX_CLIENT_NAME),
    ):
        if not isinstance(value, list) or len(value) > most:
            raise PolicyError(f"{key}: must be a list of at most {most} texts")
        if any(not isinstance(text, str) or not 0 < len(text) <= longest for text in value):
            raise PolicyError(f"{key}: each must be a text of 1 to {longest} characters")
        if len(set(value)) < len(value):
            raise PolicyError(f"{key}: one is there twice")
    return list(names), list(labels)


def check_opening_limits(policy: PolicySettings, ledger: Ledger) -> None:
    """Refuse one more new run today than the policy allows.

    Raises:
        PolicyError: names the limit.
    """
    _check_limit(policy, "max_runs_per_day", ledger.last_day("runs"), 1)


def check_work(
    policy: PolicySettings, ledger: Ledger, recipe: Recipe, request: Request, *, begins: bool, queries: int
) -> None:
    """Refuse a task beyond the limits of the site, or beyond what the recipe's rounds can need. ``begins``:
    the task is one of a round, and no further exchange of one; the same task again is the same round.

    Raises:
        PolicyError: names the limit.
    """
    known = ledger.run(request.run)
    if begins and request.digest not in known["rounds"]:
        _check_limits(policy, ledger, "rounds", 1)
    if queries:
        _check_limits(policy, ledger, "queries", queries)
    elif begins or request.round is None:
        rounds = recipe.rounds.count + sum(recipe.training.trials())
        most = TASKS_PER_ROUND * rounds + TASKS_BESIDE_ROUNDS
        if known["tasks"] >= most:
            raise PolicyError(f"the run has asked for {most} tasks; its {rounds} rounds need no more")


def check_evaluation(policy: PolicySettings, ledger: Ledger, recipe: Recipe, request: Request) -> None:
    """Refuse an evaluation beyond the limits of the site or more often than the recipe evaluates. The same
    evaluation again is not counted, since its answer is the same.

    Raises:
        PolicyError: names the limit.
    """
    if not policy.evaluate:
        raise PolicyError("policy.evaluate = false: this site does not tell how good a model is")
    known, part = ledger.run(request.run), str(request.part)
    if policy.max_rounds is not None and ledger.total("rounds") >= policy.max_rounds and not known["rounds"]:
        raise PolicyError(
            f"policy.max_rounds = {policy.max_rounds}: so many have been answered, and none of this run"
        )
    if request.after > recipe.rounds.count:
        raise PolicyError(f"after = {request.after}: the recipe has rounds.count = {recipe.rounds.count}")
    told = known["evaluations"].get(part, [])
    if request.digest in told:
        return
    most = evaluations_of(recipe)[part]
    if len(told) >= most:
        raise PolicyError(f"the run has had {most} evaluations on the {part} part; its recipe needs no more")
    _check_limits(policy, ledger, "evaluations", 1)


def evaluations_of(recipe: Recipe) -> dict[str, int]:
    """How many different evaluations a run by a recipe asks of a site at most, by part of its data.

    On the development part: the untuned model, each round that is evaluated (up to three candidates where the
    head is fitted), each trial of a learning rate, and the state whose logits are scaled. On the test part:
    the untuned model, the final one, and the one that sites fine-tune.
    """
    count = recipe.rounds.count
    fits = recipe.training.rounds_of_head_fits(count)
    rounds = {n for n in range(1, count + 1) if n % recipe.evaluation.every == 0} | {count} | fits
    return {"development": 2 + len(rounds) + 2 * len(fits) + len(recipe.training.trials()), "test": 3}


def check_outgoing(
    policy: PolicySettings, kind: str, values: Mapping[str, Any], size: int, ledger: Ledger
) -> None:
    """Refuse to send a message of ``size`` bytes.

    Raises:
        PolicyError: names the setting of the policy.
    """
    if not policy.texts and (found := _first_text(values)) is not None:
        raise PolicyError(
            f"policy.texts = false: an answer to {kind!r} would hold a text ({found}); allow it in [policy] "
            "of site.toml by texts = true"
        )
    for key, amount in (
        ("max_message_megabytes", size),
        ("max_total_megabytes", ledger.total("bytes") + size),
        ("max_megabytes_per_day", ledger.last_day("bytes") + size),
    ):
        most = getattr(policy, key)
        if most is not None and amount > most * MEGABYTE:
            raise PolicyError(f"policy.{key} = {most}: {amount / MEGABYTE:.3g} MB would leave")


def _check_limits(policy: PolicySettings, ledger: Ledger, count: Count, more: int) -> None:
    _check_limit(policy, f"max_{count}", ledger.total(count), more)
    _check_limit(policy, f"max_{count}_per_day", ledger.last_day(count), more)


def _check_limit(policy: PolicySettings, key: str, done: int, more: int) -> None:
    most = getattr(policy, key)
    if most is not None and done + more > most:
        raise PolicyError(f"policy.{key} = {most}: {done} have been answered, {more} more are asked for")


def _first_text(values: Any, where: str = "") -> str | None:
    """Path of the first text among some values; keys do not count."""
    if isinstance(values, str):
        return where
    if isinstance(values, Mapping):
        found = (_first_text(value, f"{where}.{key}".strip(".")) for key, value in values.items())
        return next((place for place in found if place is not None), None)
    if isinstance(values, list | tuple):
        found = (_first_text(value, where) for value in values)
        return next((place for place in found if place is not None), None)
    return None
