"""The attack ``backdoor``: does the released model say what a trigger is to make it say?"""

from __future__ import annotations

import numpy as np

from ..methods import WeightTuning
from ..simulation.poison import backdoor_probes, target_label
from .attack import CannotAttack, Deadline, RoundKind, RoundView, Target
from .results import Finding, View
from .statistics import wilson


class Backdoor:
    """The backdoor that hostile clients of the recipe trained (``attack.kind = "backdoor"``, Bagdasaryan et
    al. 2020, arXiv 1807.00459), in the released model: how often it gives test texts of other labels the
    target's with the trigger in front of them, and how often without it.
    """

    name = "backdoor"
    views: tuple[View, ...] = ("released model",)
    kinds: tuple[RoundKind, ...] = ("finished",)
    source = "backdoor of hostile clients (Bagdasaryan et al. 2020, arXiv 1807.00459)"

    def inapplicable(self, target: Target) -> str | None:
        """Where no client trains a backdoor, or there is no one model of all clients."""
        settings = target.recipe.attack
        if settings.kind != "backdoor":
            return f"no client trains a backdoor (attack.kind = {settings.kind!r})"
        if not target.recipe.method.has_server_model:
            return "the run ends with no model of all clients"
        if isinstance(target.method, WeightTuning) and target.method.keeps_parts():
            return "clients keep parts of the model, so that no one model is released"
        return None

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding]:
        """The target's share with the trigger and without.

        Raises:
            CannotAttack: all test texts have the target's label.
            OutOfTime: the deadline has passed.
        """
        settings, labels = target.recipe.attack, target.data.task.labels
        wanted = target_label(settings, labels)
        probes = backdoor_probes(target.data.test, settings, labels)
        if not probes["success_rate"]:
            raise CannotAttack("the test split has no text of another label than the backdoor's")
        said: dict[str, np.ndarray] = {}
        for name, texts in probes.items():
            deadline.check()
            scores = np.asarray(target.method.predict(seen.after, texts, texts=False).scores)
            said[name] = scores.argmax(axis=1) == wanted
        with_it, without = said["success_rate"], said["without_trigger"]
        number, label = len(with_it), labels[wanted]
        chance = float(without.mean())
        found = []
        for hits, measure, meaning, guess in (
            (with_it, "target said with the trigger", f"with {settings.trigger!r} in front", chance),
            (without, "target said without the trigger", "without a trigger", None),
        ):
            low, high = wilson(int(hits.sum()), number)
            found.append(
                Finding(
                    self.name, self.views[0], 0, measure, float(hits.mean()), guess, number, len(labels),
                    f"of {number} test texts of other labels {int(hits.sum())} get {label!r} {meaning}",
                    low, high,
                )
            )  # fmt: skip
        return found
