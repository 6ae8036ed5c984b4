"""Remedies against label skew: which a recipe has by default, what they need, and in words
(docs/label_skew.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import RecipeError
from ..methods.settings import TuningSettings
from ..privacy.secure_sum.terms import MOST_SITES
from .sections import Sections

FEWEST_ROUNDS_TO_FIT = 5
"""From how many rounds on the head is fitted by default, which takes two of them."""

FEWEST_TO_FIT = 100
"""How many clients fit the head by default at least, where there are so many."""

FEWEST_TO_BALANCE = 10
"""From how many clients a round on cohorts are balanced by default."""


@dataclass(frozen=True)
class Remedies:
    """What a recipe's unset settings become: those of ``[training]``, and ``rounds.selection``."""

    training: dict[str, Any]
    selection: Literal["uniform", "balanced"] | None


def remedies_of(recipe: Sections, *, linear_head: bool) -> Remedies:
    """A head that clients fit before and after training, with balanced cohorts or else logit adjustment,
    where that is the default; what the recipe itself says stays. ``training.label_skew`` and
    ``training.fit_head`` are resolved into the finer settings, and unset.

    ``linear_head`` says whether the model's classification head is known to end in a linear layer.

    Raises:
        RecipeError: the recipe asks for a head to be fitted that is not linear, for balanced cohorts, which
            nobody could draw, or says how many clients fit a head that is not fitted.
    """
    training, selection, filled = recipe.training, recipe.rounds.selection, dict[str, Any]()
    if training.fit_head and not linear_head:
        raise RecipeError(
            f"training.fit_head = true: the classification head of {recipe.model.base} is not known to end "
            "in one linear layer"
        )
    skew = training.label_skew or "auto"
    if recipe.method.only_fits:
        return Remedies(
            _probing(recipe) | _resolved(recipe), "uniform" if selection == "balanced" else selection
        )
    if skew == "balance" and recipe.baseline == "federated":
        selection = "balanced"
    default, said = linear_head and _by_default(recipe), training.fit_head_clients
    fitted = training.fit_head_rounds or default
    if said is not None and not fitted and _open(recipe):
        raise RecipeError(
            f"training.fit_head_clients = {said}: no head is fitted by default here; say in which rounds "
            "(training.fit_head_rounds = [1, -1])"
        )
    some = None
    if fitted and recipe.baseline == "federated":
        some = _clients_to_fit(recipe) if default else said
    filled["fit_head_clients"] = some
    told = some is None or (said is None and _is_natural(recipe))  # by all, for all that is known by now
    federated = recipe.baseline == "federated"
    unset = skew == "auto" and selection is None and training.logit_adjustment is None
    if unset and default and federated and told and _can_balance(recipe):
        selection = "balanced"
    if selection == "balanced":
        _check_balance(recipe, default, some)
    if training.logit_adjustment is None:  # what balanced cohorts cancel need not be taken out
        by_default = skew == "auto" and default and selection != "balanced"
        skewed = federated and (by_default or skew == "adjust")
        filled["logit_adjustment"] = 1.0 if skewed else 0.0
        if not filled["logit_adjustment"]:
            filled["prior_count"] = 1.0  # which has no effect then
    if training.fit_head_rounds is None:
        filled["fit_head_rounds"] = [1, -1] if default else []
    if training.freeze_head_rounds is None:  # what was fitted before training is not to drift
        before = 1 in (filled.get("fit_head_rounds") or training.fit_head_rounds or ())
        rests = before and training.head_learning_rate is None
        filled["freeze_head_rounds"] = recipe.rounds.count if rests else 0
    return Remedies(filled | _resolved(recipe), selection)


def _resolved(recipe: Sections) -> dict[str, Any]:
    """What of the coarser settings the finer ones now say."""
    training = recipe.training
    return {key: None for key in ("label_skew", "fit_head") if getattr(training, key) is not None}


def check_label_skew(recipe: Sections) -> None:
    """Refuse coarser settings that contradict finer ones, or that the task does not have.

    Raises:
        ValueError: names both settings.
    """
    training, selection = recipe.training, recipe.rounds.selection
    if training.label_skew not in (None, "auto"):
        skew, adjustment = training.label_skew, training.logit_adjustment
        where = f"training.label_skew = {skew!r}"
        if recipe.data.task != "classification":
            raise ValueError(f"{where}: needs labels")
        if adjustment is not None and (adjustment > 0) != (skew == "adjust"):
            raise ValueError(
                f"{where}: does not go with training.logit_adjustment = {adjustment}; leave one unset"
            )
        if selection is not None and (selection == "balanced") != (skew == "balance"):
            raise ValueError(f"{where}: does not go with rounds.selection = {selection!r}; leave one unset")
        if skew == "balance" and training.fit_head is False:
            raise ValueError(
                f"{where}: clients tell of their labels when the head is fitted; leave fit_head unset"
            )
    if training.fit_head is not None:
        where = f"training.fit_head = {str(training.fit_head).lower()}"
        if training.fit_head and recipe.data.task != "classification":
            raise ValueError(f"{where}: needs labels and a head")
        rounds = training.fit_head_rounds
        if rounds is not None and bool(rounds) != training.fit_head:
            raise ValueError(
                f"{where}: does not go with training.fit_head_rounds = {rounds}; leave one unset"
            )
        if training.fit_head and rounds is None:
            if recipe.rounds.count < 3 and not recipe.method.only_fits and recipe.baseline != "local":
                raise ValueError(
                    f"{where}: takes two rounds; rounds.count = {recipe.rounds.count} must be 3 or more"
                )
            if reason := why_no_head_fit(recipe):
                raise ValueError(f"{where}: {reason}")


def _probing(recipe: Sections) -> dict[str, Any]:
    """What the training settings of a method that only fits become: a fit in its one round, no training."""
    some, count = recipe.training.fit_head_clients, recipe.clients.count
    if recipe.baseline == "federated" and some is None and _is_natural(recipe):
        some = FEWEST_TO_FIT
    elif _summed(recipe) and some is None and count > MOST_SITES:
        some = MOST_SITES
    return {
        "fit_head_rounds": [1], "fit_head_clients": some, "logit_adjustment": 0.0, "prior_count": 1.0,
        "freeze_head_rounds": 0, "warmup_rounds": 0,
    }  # fmt: skip


def settled(recipe: Sections, clients: int) -> Remedies:
    """What a complete recipe's settings become once it is known how many clients there are: of natural ones,
    all fit the head as long as that is allowed; where they are more, nobody could draw balanced cohorts, and
    logits are adjusted instead. A pure function, so that all parties and a resumed run come to the same.
    """
    some, selection, filled = recipe.training.fit_head_clients, recipe.rounds.selection, dict[str, Any]()
    if some is None or not _is_natural(recipe) or recipe.baseline != "federated":
        return Remedies(filled, selection)
    if clients <= some:
        filled["fit_head_clients"] = None
    elif selection == "balanced":
        selection, filled["logit_adjustment"] = "uniform", 1.0
    return Remedies(filled, selection)


def in_words(recipe: Sections) -> str | None:
    """What a complete recipe does against label skew; None if nothing."""
    training, last = recipe.training, recipe.rounds.count
    parts = []
    if fits := sorted(training.rounds_of_head_fits(last)):
        named = f"round {fits[0]}" if len(fits) == 1 else f"rounds {', '.join(map(str, fits))}"
        who = f"{training.fit_head_clients} clients fit" if training.fit_head_clients else "all clients fit"
        if recipe.baseline == "centralised":
            who = "all data fits"
        rests = (training.freeze_head_rounds or 0) >= last > len(fits)
        parts.append(f"{who} the head in {named}{', and it rests otherwise' if rests else ''}")
    if recipe.baseline == "federated" and recipe.rounds.selection == "balanced":
        parts.append("cohorts have nearly everybody's labels, and clients as many batches as each other")
    if training.logit_adjustment:
        parts.append("logits are adjusted by each client's labels")
    if fits and recipe.privacy is not None and recipe.privacy.unit != "none":
        parts.append("the sums of the fit are noised, and no label is withheld")
    elif fits and recipe.baseline == "federated":
        least = training.least_texts
        if _summed(recipe):
            assert recipe.secure_sum is not None
            owners = recipe.secure_sum.least_owners
            few = f", or of which they have fewer than {least} texts together," if least > 1 else ""
            parts.append("the server sees sums over these clients alone")
            parts.append(f"labels that fewer than {owners} of them have{few} are left out")
            return "; ".join(parts)
        parts.append(
            f"labels of which a client has fewer than {least} texts are withheld from the fit"
            if least > 1
            else "labels of which a client has a single text take part in the fit"
        )
    return "; ".join(parts) or None


def _summed(recipe: Sections) -> bool:
    """Whether the server is shown sums over clients alone."""
    return recipe.secure_sum is not None and recipe.secure_sum.on


def _is_natural(recipe: Sections) -> bool:
    """Whether the number of clients is known only when their data is."""
    return recipe.clients.partition == "natural"


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
    if setting := recipe.method.trains_every_round:
        return f"{setting} needs every round to train in turn"
    return None


def _open(recipe: Sections) -> bool:
    """Whether remedies are for the defaults to say: in training a classifier, where the recipe says nothing
    of them. Baselines have their head fitted alike, so that a comparison compares one thing.
    """
    training = recipe.training
    unsaid = training.logit_adjustment is None or training.label_skew is not None
    return (
        (unsaid or training.fit_head is True)
        and training.fit_head_rounds is None
        and training.fit_head is not False
        and recipe.data.task == "classification"
        and isinstance(recipe.method, TuningSettings)
    )


def _by_default(recipe: Sections) -> bool:
    """Whether the head is fitted where the recipe does not say in which rounds: where it asks for it, or one
    model is trained for all clients, these are likely to answer, and sums go with the rest of the recipe.
    """
    if not _open(recipe) or why_no_head_fit(recipe) is not None:
        return False
    personal = recipe.method.personal or recipe.personalisation.keep
    return recipe.training.fit_head is True or (
        not recipe.training.freeze_head_rounds
        and not personal
        and not recipe.participation.dropout
        and recipe.rounds.count >= FEWEST_ROUNDS_TO_FIT
    )


def _clients_to_fit(recipe: Sections) -> int | None:
    """How many clients are asked in each of two fits by default: as many as the recipe says; else half as
    many as all rounds ask, or a few more; all (None) where they are no more than that, or where the recipe
    asks for cohorts that need it.
    """
    if recipe.training.fit_head_clients is not None:
        return recipe.training.fit_head_clients
    count = None if _is_natural(recipe) else recipe.clients.count
    most = max(FEWEST_TO_FIT, recipe.rounds.count * recipe.rounds.cohort(count) // 2)
    if _summed(recipe):
        most = min(most, MOST_SITES)
    balanced = recipe.rounds.selection == "balanced" or recipe.training.label_skew == "balance"
    every = balanced or (count is not None and count <= most)
    return None if every else most


def _can_balance(recipe: Sections) -> bool:
    """Whether cohorts are balanced by default: where they are large enough that labels even out, as in what
    was measured, they are at most half of all clients or all of them, and each does all its work.
    """
    counted, count = not _is_natural(recipe), recipe.clients.count
    cohort = recipe.rounds.cohort(count) if counted else recipe.rounds.clients_per_round or 0
    even = not counted or 2 * cohort <= count or cohort == count
    if _summed(recipe) or (recipe.privacy is not None and recipe.privacy.unit != "none"):
        return False  # nobody may tell its labels
    said = recipe.training.prior_count != 1  # of the adjustment
    return cohort >= FEWEST_TO_BALANCE and even and not said and not recipe.participation.partial


def _check_balance(recipe: Sections, default: bool, some: int | None) -> None:
    """What balanced cohorts need.

    Raises:
        RecipeError: no round before the last fits the head, which is when clients tell of their labels, or
            only ``some`` are asked then, and these cannot be all there are.
    """
    if some is not None and not (_is_natural(recipe) and some >= FEWEST_TO_FIT):
        raise RecipeError(
            "rounds.selection = 'balanced': needs all clients to tell of their labels, where "
            f"training.fit_head_clients = {some} asks some of them; leave one of the two unset"
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
