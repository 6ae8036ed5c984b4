"""Which candidates to score next, and which is best: pure functions of what was counted.

A candidate's statistics are how many examples it was scored on, the sum of its rewards (each from 0 to 1:
right or wrong for classification) and the sum of its log-likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta


@dataclass(frozen=True)
class Tally:
    """What was counted of one candidate."""

    count: int = 0
    reward: float = 0.0
    score: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, self.reward + other.reward, self.score + other.score)

    @property
    def mean(self) -> float:
        """The mean reward; 0 where nothing was counted."""
        return self.reward / self.count if self.count else 0.0

    @property
    def likelihood(self) -> float:
        """The mean log-likelihood, which tells candidates of equal reward apart."""
        return self.score / self.count if self.count else -math.inf


Tallies = Mapping[int, Tally]


def ranking(tallies: Tallies) -> list[int]:
    """Candidates from the best mean reward to the worst; equal ones by likelihood, then by number."""
    return sorted(tallies, key=lambda i: (-tallies[i].mean, -tallies[i].likelihood, i))


def halve(tallies: Tallies, alive: Sequence[int]) -> list[int]:
    """The better half of those still in the race, rounded up (successive halving, Jamieson and Talwalkar
    2016), in ascending order.
    """
    order = ranking({i: tallies[i] for i in alive})
    return sorted(order[: math.ceil(len(order) / 2)])


def is_stage_end(round_number: int, rounds: int, candidates: int) -> bool:
    """Whether successive halving halves after this round.

    ``ceil(log2(candidates))`` halvings leave one candidate; they come at even distances, the last after round
    ``rounds``. With fewer rounds than halvings there is one after every round, and several are left.
    """
    stages = math.ceil(math.log2(candidates)) if candidates > 1 else 0
    if not stages:
        return False
    if stages >= rounds:
        return True
    return any(round_number == math.ceil(rounds * stage / stages) for stage in range(1, stages + 1))


def upper_bounds(tallies: Tallies, exploration: float) -> dict[int, float]:
    """UCB1 (Auer et al. 2002): mean + exploration * sqrt(2 ln N / n), N all examples, n the candidate's;
    infinite for a candidate that was never scored.
    """
    total = max(2, sum(tally.count for tally in tallies.values()))
    return {
        i: tally.mean + exploration * math.sqrt(2 * math.log(total) / tally.count)
        if tally.count
        else math.inf
        for i, tally in tallies.items()
    }


def posterior_draws(tallies: Tallies, seed: Sequence[int]) -> dict[int, float]:
    """Thompson sampling: for each candidate one draw from Beta(1 + rewards, 1 + examples - rewards)."""
    generator = np.random.default_rng(list(seed))
    return {
        i: float(generator.beta(1 + tallies[i].reward, 1 + tallies[i].count - tallies[i].reward))
        for i in sorted(tallies)
    }


def highest(values: Mapping[int, float], count: int) -> list[int]:
    """The candidates with the highest values, in ascending order; of equal ones those with lower numbers."""
    return sorted(sorted(values, key=lambda i: (-values[i], i))[:count])


def best(tallies: Tallies) -> int:
    """The candidate to use: that of the highest lower bound, the 5 % quantile of its Beta posterior, so that
    one that was lucky on few examples is not preferred to one that is known to be good.
    """
    bounds = {
        i: float(beta.ppf(0.05, 1 + tally.reward, 1 + tally.count - tally.reward))
        for i, tally in tallies.items()
    }
    return min(tallies, key=lambda i: (-bounds[i], -tallies[i].likelihood, i))
