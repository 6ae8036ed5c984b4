"""Groups of runs that differ in their seed only, and the statistics over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd
from scipy import stats

from ..evaluation.settings import TEXT_METRICS
from .methods import is_to_beat, own_title, title
from .read import Baseline, Run

BASELINES: tuple[Baseline, ...] = get_args(Baseline)
METRIC_ORDER = (
    *("accuracy", "choice_accuracy", "calibration_error", "macro_f1", "rouge_l", "bleu", "chrf", "mrr"),
    *("preference_accuracy", "loss", "reward_margin", "likelihood_accuracy", "perplexity"),
    *("exact_match", "token_f1"),  # last: a narrow terminal shows the first ones
)
PERCENT_METRICS = frozenset(TEXT_METRICS)
UNBOUNDED_METRICS = frozenset({"reward_margin"})
"""Metrics that are no share and no loss: any number, and the larger the better."""
NOT_COMPARED = frozenset(
    {"seed", "output", "device", "device_map", "threads", "workers", "generate", "generate_limit"}
)
"""Last parts of settings that leave the question that a run answers as it is."""


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one method and baseline, in the order of their seeds.

    ``variant`` names the settings that tell this group from others of the same method and baseline, as in
    ``clients.alpha=0.1``; it is empty where there is one such group only.
    """

    method: str
    baseline: Baseline
    variant: str
    runs: list[Run]

    @property
    def own_title(self) -> str | None:
        """What the runs are called by their settings, where that is not the method's title: ``zero-shot``."""
        return own_title(self.method, self.runs[0].settings)

    @property
    def plain_name(self) -> str:
        """The method as people write it."""
        return self.own_title or title(self.method)

    @property
    def method_name(self) -> str:
        """The method with its variant, as in ``LoRA (clients.alpha=0.1)``."""
        return f"{self.plain_name} ({self.variant})" if self.variant else self.plain_name

    @property
    def label(self) -> str:
        """Baseline and method, as in ``federated soft prompt``; of one place the title alone where that says
        it all, as in ``few-shot (4)``.
        """
        if self.own_title and self.baseline == "centralised":
            return self.method_name
        return f"{self.baseline} {self.method_name}"


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good ones."""
    return "loss" in metric or metric in ("perplexity", "clients_asked", "calibration_error")


def best_first(value: float, metric: str) -> float:
    """A sort key that puts the best value first and what is not a number last."""
    if math.isnan(value):
        return math.inf
    return value if lower_is_better(metric) else -value


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t); the latter is NaN for fewer than two
    values.
    """
    numbers = list(values)
    if not numbers:
        return math.nan, math.nan
    series = pd.Series(numbers, dtype=float)
    mean = float(series.mean(skipna=False))
    if len(numbers) < 2:
        return mean, math.nan
    spread = float(series.std(skipna=False)) / math.sqrt(len(numbers))
    return mean, float(stats.t.ppf(0.975, len(numbers) - 1)) * spread


def mean_metric(group: Group, metric: str) -> tuple[float, float]:
    """Mean over seeds of a metric on the test split, and half its 95% interval."""
    return mean_and_interval(run.summary.metrics.get(metric, math.nan) for run in group.runs)


def trivial_metric(groups: Sequence[Group], kind: Literal["copy", "untuned"], metric: str) -> float:
    """A metric on the test split of the untuned model, or of copies of the prompts: the mean over all runs
    that measured it, NaN where none did.
    """
    summaries = [run.summary for group in groups for run in group.runs]
    every = [summary.copy if kind == "copy" else summary.untuned for summary in summaries]
    values = [values[metric] for values in every if not math.isnan(values.get(metric, math.nan))]
    return mean_and_interval(values)[0]


def metric_names(runs: Sequence[Run]) -> list[str]:
    """The metrics of some runs; the first is the one that they are ranked by.

    Local runs have no say in that: with a model for each client, they may have no texts to score.
    """
    names = dict.fromkeys(name for run in runs for name in run.summary.metrics)
    known = [name for name in METRIC_ORDER if name in names]
    ordered = known + [name for name in names if name not in METRIC_ORDER]
    ranking = [run for run in runs if run.summary.baseline != "local"] or runs
    shared = [name for name in ordered if all(name in run.summary.metrics for run in ranking)]
    return shared + [name for name in ordered if name not in shared]


def measured_on_clients(groups: Sequence[Group], metric: str) -> bool:
    """Whether any run scored its clients by a metric."""
    return any(metric in run.summary.worst_client for group in groups for run in group.runs)


def _compared(run: Run) -> dict[str, str]:
    settings = run.settings or {"model": run.summary.model, "data": run.summary.data}
    return {
        key: value
        for key, value in settings.items()
        if key.rpartition(".")[2] not in NOT_COMPARED and not key.startswith(("tracking.", "workers."))
    }


def _variants(runs: Sequence[Run]) -> list[str]:
    settings = [_compared(run) for run in runs]
    keys = dict.fromkeys(key for values in settings for key in values)
    differing = [key for key in keys if len({values.get(key) for values in settings}) > 1]
    return [", ".join(f"{key}={values.get(key, 'unset')}" for key in differing) for values in settings]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by method, baseline, own title and variant: first centralised, then federated, then local; each by
    quality.

    Runs of one method and baseline whose recipes differ in more than the seed are different groups, since the
    mean over them would answer no question.
    """
    pairs: dict[tuple[str, Baseline, str | None], list[Run]] = {}
    for run in runs:
        method = run.summary.method
        pairs.setdefault((method, run.summary.baseline, own_title(method, run.settings)), []).append(run)
    groups = []
    for (method, baseline, _), members in pairs.items():
        variants: dict[str, list[Run]] = {}
        for run, variant in zip(members, _variants(members), strict=True):
            variants.setdefault(variant, []).append(run)
        for variant, same in variants.items():
            ordered = sorted(same, key=lambda run: (run.summary.seed, run.name))
            groups.append(Group(method, baseline, variant, ordered))
    ranked_by = metric_names(runs)[0]

    def position(group: Group) -> tuple[int, float, str]:
        return (
            BASELINES.index(group.baseline),
            best_first(mean_metric(group, ranked_by)[0], ranked_by),
            group.label,
        )

    return sorted(groups, key=position)


def best_group(groups: Sequence[Group], metric: str) -> Group:
    """The best federated group, or the best of all where none is federated; one that others have to beat only
    where there is nothing else.
    """
    customised = [group for group in groups if not is_to_beat(group.method)] or groups
    federated = [group for group in customised if group.baseline == "federated"]
    return min(federated or customised, key=lambda group: best_first(mean_metric(group, metric)[0], metric))


def history(group: Group, metric: str) -> pd.DataFrame:
    """Development quality by round: columns ``round``, ``mean``, ``interval`` and ``bytes`` (sent so far)."""
    rows = [
        (line.round, line.development[metric], line.bytes_up_total + line.bytes_down_total)
        for run in group.runs
        for line in run.history
        if metric in line.development
    ]
    frame = pd.DataFrame(rows, columns=["round", "value", "bytes"])
    records = []
    for number, part in frame.groupby("round"):
        mean, interval = mean_and_interval(part["value"])
        records.append((number, mean, interval, float(part["bytes"].mean())))
    return pd.DataFrame(records, columns=["round", "mean", "interval", "bytes"])


def best_development(group: Group, metric: str) -> tuple[float, float]:
    """The best mean development quality of a group's rounds after the untuned model, and the bytes sent until
    then; both NaN where nothing was measured.
    """
    frame = history(group, metric)
    frame = frame[(frame["round"] > 0) & frame["mean"].notna()]
    if frame.empty:
        return math.nan, math.nan
    means = frame["mean"].to_numpy()
    place = int(means.argmin() if lower_is_better(metric) else means.argmax())
    return float(means[place]), float(frame["bytes"].iloc[place])


def bytes_to_reach(group: Group, metric: str, value: float) -> float:
    """The bytes that a group had sent when its mean development quality first was as good as ``value``; NaN
    where it never was.
    """
    frame = history(group, metric)
    sign = -1 if lower_is_better(metric) else 1
    reached = frame[(frame["round"] > 0) & (sign * frame["mean"] >= sign * value)]
    return math.nan if reached.empty else float(reached["bytes"].iloc[0])


def client_counts(runs: Sequence[Run]) -> tuple[int, int]:
    """How many clients there are in the run that has most, and of how many of them a test part is known.

    A summary of an older version does not say how many there are; then it is those that were ever asked.
    """

    def counts(run: Run) -> tuple[int, int]:
        scored = len(run.summary.clients)
        asked = {client for line in run.history for client in line.cohort} | set(run.summary.clients)
        return run.summary.client_count or len(asked), scored

    return max(map(counts, runs), default=(0, 0))


def client_scores(group: Group, metric: str) -> pd.DataFrame:
    """Each client's score on its own test part, mean over seeds: columns ``client``, ``score`` and
    ``examples``.
    """
    rows = [
        (client, scores[metric], scores.get("test_examples", math.nan))
        for run in group.runs
        for client, scores in run.summary.clients.items()
        if metric in scores
    ]
    frame = pd.DataFrame(rows, columns=["client", "score", "examples"])
    return frame.groupby("client", sort=False).mean().reset_index()
