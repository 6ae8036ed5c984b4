"""Remedies against label skew: which a recipe has by default, what they need, and in words
(docs/experiment.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .aggregation.settings import AggregationSettings
from .data.settings import ClientSettings, DataSettings
from .errors import RecipeError
from .methods import MethodSettings
from .methods.settings import TuningSettings
from .models.load import has_linear_head
from .models.settings import ModelSettings
from .recipe_sections import PersonalisationSettings, RoundSettings
from .simulation.settings import AttackSettings, ParticipationSettings
from .training.settings import TrainingSettings

FEWEST_ROUNDS_TO_FIT = 5
"""From how many rounds on the head is fitted by default, which takes two of them."""

FEWEST_TO_ASK = 50
"""From how many clients on the head is fitted by default to some of them, where all would be too many."""

FEWEST_TO_BALANCE = 10
"""From how many clients a round on cohorts are balanced by default."""


class Sections(Protocol):
    """What is read of a recipe."""

    @property
    def baseline(self) -> Literal["federated", "centralised", "local"]: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> DataSettings: ...
    @property
    def clients(self) -> ClientSettings: ...
    @property
    def method(self) -> MethodSettings: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def aggregation(self) -> AggregationSettings: ...
    @property
    def personalisation(self) -> PersonalisationSettings: ...
    @property
    def rounds(self) -> RoundSettings: ...
    @property
    def participation(self) -> ParticipationSettings: ...
    @property
    def attack(self) -> AttackSettings: ...


@dataclass(frozen=True)
class Remedies:
    """What a recipe's unset settings become: those of ``[training]``, and ``rounds.selection``."""

    training: dict[str, Any]
    selection: Literal["uniform", "balanced"] | None


def remedies_of(recipe: Sections) -> Remedies:
    """A head that all clients fit before and after training, or some where all would be too many, with
    balanced cohorts or else logit adjustment, where that is the default; what the recipe itself says stays.

    Raises:
        RecipeError: the recipe asks for balanced cohorts, which nobody could draw.
    """
    training, selection, filled = recipe.training, recipe.rounds.selection, dict[str, Any]()
    default = _by_default(recipe)
    asked = training.fit_head_clients
    if default and asked is None and not _can_ask(recipe, recipe.clients.count):
        asked = filled["fit_head_clients"] = _answers(recipe) // 2
    if default and selection is None and asked is None and _can_balance(recipe):
        selection = "balanced"
    if selection == "balanced":
        _check_balance(recipe, default)
    if training.logit_adjustment is None:  # what balanced cohorts cancel need not be taken out
        filled["logit_adjustment"] = 1.0 if default and selection != "balanced" else 0.0
        if not filled["logit_adjustment"]:
            filled["prior_count"] = 1.0  # which has no effect then
    if training.fit_head_rounds is None:
        filled["fit_head_rounds"] = [1, -1] if default else []
        if not default:
            filled["fit_head_clients"] = None  # which has no effect then
    return Remedies(filled, selection)


def in_words(recipe: Sections) -> str | None:
    """What a complete recipe does against label skew; None if nothing."""
    training, last = recipe.training, recipe.rounds.count
    parts = []
    if fits := sorted(training.rounds_of_head_fits(last)):
        named = f"round {fits[0]}" if len(fits) == 1 else f"rounds {', '.join(map(str, fits))}"
        who = f"{training.fit_head_clients} clients" if training.fit_head_clients else "all clients"
        parts.append(f"{who} fit the head in {named}")
    if recipe.baseline == "federated" and recipe.rounds.selection == "balanced":
        parts.append("cohorts have nearly everybody's labels")
    if training.logit_adjustment:
        parts.append("logits are adjusted by each client's labels")
    return "; ".join(parts) or None


def why_no_head_fit(recipe: Sections) -> str | None:
    """What the sums that a head is fitted from do not go with."""
    attack = recipe.attack.kind
    if recipe.aggregation.rule != "mean" or recipe.aggregation.correction != "none":
        return "needs aggregation.rule = 'mean' and aggregation.correction = 'none'"
    if recipe.participation.buffer is not None:
        return "needs all clients at one state; leave participation.buffer unset"
    if "head" in recipe.personalisation.keep:
        return "does not go with personalisation.keep = ['head']"
    if attack in ("sign_flip", "random", "alie"):
        return f"attack.kind = {attack!r} is defined for changes, not for sums"
    if getattr(recipe.method, "variant", "") == "rolora":
        return "method.variant = 'rolora' needs every round to train in turn"
    return None


def _by_default(recipe: Sections) -> bool:
    """Whether remedies are the default: in federated training of a classifier that is one model for all
    clients, where nothing was said of label skew, all clients are likely to answer, and asking all of them
    twice is little beside training.
    """
    training, rounds, method = recipe.training, recipe.rounds, recipe.method
    said = training.logit_adjustment is not None or training.fit_head_rounds is not None
    own_ranks = getattr(method, "client_ranks", None) or getattr(method, "private_rank", 0)
    personal = getattr(method, "variant", "") == "fedsa" or own_ranks or recipe.personalisation.keep
    asked = training.fit_head_clients or recipe.clients.count
    if training.fit_head_clients is None and rounds.selection != "balanced":  # some will do
        asked = min(asked, max(FEWEST_TO_ASK, _answers(recipe) // 2))
    return (
        not said
        and not training.freeze_head_rounds
        and recipe.baseline == "federated"
        and recipe.data.task == "classification"
        and isinstance(method, TuningSettings)
        and not personal
        and not recipe.participation.dropout
        and rounds.count >= FEWEST_ROUNDS_TO_FIT
        and _can_ask(recipe, asked)
        and why_no_head_fit(recipe) is None
        and has_linear_head(recipe.model)
    )


def _can_ask(recipe: Sections, clients: int) -> bool:
    """Whether asking so many clients twice is no more than what all rounds ask; so it is where clients are
    natural, for how many there are is not known beforehand.
    """
    return recipe.clients.partition == "natural" or 2 * clients <= _answers(recipe)


def _answers(recipe: Sections) -> int:
    """How many answers all rounds have."""
    return recipe.rounds.count * (recipe.rounds.clients_per_round or recipe.clients.count)


def _can_balance(recipe: Sections) -> bool:
    """Whether cohorts are balanced by default: where they are large enough that labels even out, as in what
    was measured, two of them at least fit into the clients or all clients are one, and each does all its
    work.
    """
    counted, count = recipe.clients.partition != "natural", recipe.clients.count
    asked = recipe.rounds.clients_per_round or (count if counted else 0)
    fits = not counted or 2 * asked <= count or asked == count
    enough = asked >= FEWEST_TO_BALANCE and fits
    said = recipe.training.prior_count != 1  # of the adjustment
    return enough and not said and not recipe.participation.partial


def _check_balance(recipe: Sections, default: bool) -> None:
    """What balanced cohorts need.

    Raises:
        RecipeError: no round before the last fits the head, which is when clients tell of their labels, or
            not all clients are asked then.
    """
    if recipe.training.fit_head_clients is not None and recipe.baseline == "federated":
        raise RecipeError(
            "rounds.selection = 'balanced': needs all clients to tell of their labels; leave "
            f"training.fit_head_clients = {recipe.training.fit_head_clients} unset"
        )
    last = recipe.rounds.count
    first = min(recipe.training.rounds_of_head_fits(last), default=last)
    if default or recipe.baseline != "federated" or first < last:
        return
    reason = why_no_head_fit(recipe) if recipe.training.fit_head_rounds is None else None
    raise RecipeError(
        "rounds.selection = 'balanced': needs a round before the last in training.fit_head_rounds, when "
        f"clients tell how many examples of each label they have{'; which ' + reason if reason else ''}"
    )
