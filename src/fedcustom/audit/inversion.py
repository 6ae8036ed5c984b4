"""The attack ``inversion``: what do a client's texts say, by its change alone?"""

from __future__ import annotations

from .attack import LATE, UNSEEN, CannotAttack, Deadline, OutOfTime, RoundKind, RoundView, Target
from .auxiliary import auxiliary_findings
from .changes import single_changes
from .results import Finding, NotRun, View
from .span_check import span_findings


class Inversion:
    """Reads a client's tokens and texts from its change, without candidate texts.

    Where attention of the first layer is trained, tokens with their positions and whole texts by the span of
    its change (:mod:`.span_check`), or where there is no exact one, tokens by its leading directions
    (:mod:`.leading`). For every method, tokens by public texts whose gradients resemble the
    change (:mod:`.auxiliary`), which gives a bag of words at best. Attacks that search for texts by matching
    gradients (LAMP, Balunovic et al. 2022, arXiv 2202.08827) are not made.
    """

    name = "inversion"
    views: tuple[View, ...] = ("client's update", "state difference")
    kinds: tuple[RoundKind, ...] = ("training",)
    source = "span check of DAGER (Petrov et al. 2024, arXiv 2405.15586); gradients of auxiliary texts"

    def inapplicable(self, target: Target) -> str | None:
        """Where no changes of trained tensors are sent, or gradients have another form than these."""
        return UNSEEN if target.sums_only else target.no_gradients

    def attack(self, target: Target, seen: RoundView, deadline: Deadline) -> list[Finding | NotRun]:
        """What the changes of single clients say; of each part that cannot be made, why.

        Raises:
            CannotAttack: none can be seen.
            OutOfTime: the deadline has passed.
        """
        changes = single_changes(target, seen)
        if not changes:
            raise CannotAttack("no change of a single client can be seen in the round")
        deadline.check()
        found: list[Finding | NotRun] = []
        for part, words in ((span_findings, "span check"), (auxiliary_findings, "auxiliary texts")):
            try:
                found += part(target, seen, changes, deadline)
            except OutOfTime:
                found.append(NotRun(self.name, f"{words}: {LATE}", seen.number))
            except CannotAttack as error:
                found.append(NotRun(self.name, f"{words}: {error}", seen.number))
        return found
