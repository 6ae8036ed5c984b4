"""One page of claims, verdicts and figures, from the results of experiments alone.

    python scripts/summary.py results docs/results

Writes ``summary.md`` and ``quality-bytes.svg``. A claim without the cells that it needs is listed as not
measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcustom.core.files import write_text
from fedcustom.experiment.paired import paired_difference
from fedcustom.experiment.plots import COLOURS, SYMBOLS
from fedcustom.experiment.results import Result, read_result, result_paths
from fedcustom.report import formatting as words
from fedcustom.report.axes import Axis, linear, logarithmic, value_range
from fedcustom.report.groups import mean_and_interval
from fedcustom.report.svg import Chart, Mark

SETS = {"trec": "TREC-6", "sst2": "SST-2", "banking77": "banking77"}
METHODS = {
    "memory": "prefix memory", "lora": "LoRA", "kv": "key-value pairs", "adapter": "adapter",
    "bitfit": "BitFit", "soft_prompt": "soft prompt", "full": "full fine-tuning",
}  # fmt: skip
PROBES = {"federated-probe": "linear probe, federated", "centralised-probe": "linear probe, centralised"}
EVEN, SKEWED = "iid", "dirichlet-0.1"
MISSING = "not measured"

Place = dict[str, str]


class Results:
    """Results of several experiments by their points; of those of one recipe the last one counts."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        found: dict[str, Result] = {}
        for name in names:
            found |= {result.digest: result for result in map(read_result, result_paths(folder / name))}
        self.found = list(found.values())

    def at(self, **points: str) -> list[Result]:
        """Those at these points, a federated run where nothing is said of training."""
        wanted = {"training": "federated", **points}
        return [
            result
            for result in self.found
            if {"training": "federated", **result.points}.items() >= wanted.items()
            and ("baseline" in points) == ("baseline" in result.points)
        ]


@dataclass(frozen=True)
class Claim:
    """A claim, what it asks for, and for each data set its figure in points and whether it holds."""

    text: str
    wanted: str
    figures: Mapping[str, tuple[str, bool | None]]

    def row(self) -> str:
        """A line of the table."""
        cells = [self.figures[name][0] for name in SETS]
        return f"| {' | '.join([self.text, self.wanted, *cells, self.verdict])} |"

    @property
    def verdict(self) -> str:
        """Reached where it holds on all sets."""
        holds = [held for _, held in self.figures.values()]
        if None in holds:
            known = [held for held in holds if held is not None]
            return f"open: measured on {len(known)} of {len(holds)}" if known else MISSING
        if all(holds):
            return "**reached**"
        return f"**not reached** ({sum(map(bool, holds))} of {len(holds)})"


def difference_claim(
    text: str,
    wanted: str,
    pairs: Mapping[str, tuple[Sequence[Result], Sequence[Result]]],
    holds: Callable[[float, float], bool],
) -> Claim:
    """A claim about a difference of accuracies, paired by seed; ``holds`` is told its mean and half the width
    of its interval.
    """
    figures: dict[str, tuple[str, bool | None]] = {}
    for name, (mine, other) in pairs.items():
        found = paired_difference(mine, other, "accuracy")
        if found is None:
            figures[name] = (MISSING, None)
            continue
        mean, half, seeds = found
        figures[name] = (f"{100 * mean:+.1f} ± {100 * half:.1f} ({seeds})", holds(mean, half))
    return Claim(text, wanted, figures)


def claims(results: Results) -> list[Claim]:
    """The claims about federated prefix-tuning, for the prefix memory."""

    def memory(name: str, partition: str, training: str = "federated") -> list[Result]:
        return results.at(data=name, partition=partition, method="memory", training=training)

    def pairs(
        mine: Callable[[str], list[Result]], other: Callable[[str], list[Result]]
    ) -> dict[str, tuple[list[Result], list[Result]]]:
        return {name: (mine(name), other(name)) for name in SETS}

    made = [
        difference_claim(
            "close to centralised: even labels, less centralised training on as many examples",
            "at least −1.0",
            pairs(lambda n: memory(n, EVEN), lambda n: memory(n, EVEN, "centralised")),
            lambda mean, half: mean >= -0.01,
        ),
        difference_claim(
            "robust to label skew: Dirichlet 0.1, less its own score with even labels", "at least −2.0",
            pairs(lambda n: memory(n, SKEWED), lambda n: memory(n, EVEN)),
            lambda mean, half: mean >= -0.02,
        ),
    ]  # fmt: skip
    others: list[tuple[str, str, Place, Callable[[float, float], bool]]] = [
        ("competitive: {}, less LoRA", "the interval begins above −1.0", {"method": "lora"}, _not_behind),
        (
            "better than the linear probe: {}, less the federated probe", "the interval is above 0",
            {"baseline": "federated-probe"}, _ahead,
        ),
    ]  # fmt: skip
    for said, partition in (("Dirichlet 0.1", SKEWED), ("even labels", EVEN)):
        for text, wanted, place, holds in others:
            against = {
                name: (memory(name, partition), results.at(data=name, partition=partition, **place))
                for name in SETS
            }
            made.append(difference_claim(text.format(said), wanted, against, holds))
    return [*made, efficiency(results)]


def _not_behind(mean: float, half: float) -> bool:
    """Whether the interval does not reach below minus one point."""
    return mean - half >= -0.01


def _ahead(mean: float, half: float) -> bool:
    """Whether the interval lies above 0."""
    return mean - half > 0


def efficiency(results: Results) -> Claim:
    """Bytes of a client and round against LoRA."""
    figures: dict[str, tuple[str, bool | None]] = {}
    for name in SETS:
        sent = [
            mean_and_interval(result.bytes["up_per_client_round"] for result in there)[0]
            for method in ("memory", "lora")
            if (there := results.at(data=name, partition=SKEWED, method=method))
        ]
        if len(sent) < 2:
            figures[name] = (MISSING, None)
        else:
            figures[name] = (
                f"{100 * sent[0] / sent[1]:.0f} % of {words.byte_count(sent[1])}",
                sent[0] <= sent[1],
            )
    return Claim("efficient: bytes up a client and round, of LoRA's", "at most 100 %", figures)


def accuracy_table(results: Results) -> list[str]:
    """Test accuracies with intervals, by data set and partition."""
    columns = [(name, partition) for name in SETS for partition in (EVEN, SKEWED)]
    heads = [
        f"{SETS[name]}, {'even' if partition == EVEN else 'Dirichlet 0.1'}" for name, partition in columns
    ]
    lines = [f"|  | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    rows: list[tuple[str, Place]] = [(METHODS[method], {"method": method}) for method in METHODS]
    rows += [(said, {"baseline": name}) for name, said in PROBES.items()]
    for said, place in rows:
        cells = []
        for name, partition in columns:
            there = results.at(data=name, partition=partition, **place)
            mean, half = mean_and_interval(result.metrics["accuracy"] for result in there)
            text = f"{words.score(mean, 'accuracy')} {words.interval(half, 'accuracy')}".strip()
            cells.append(f"{text} ({len(there)})" if there else "–")
        if any(cell != "–" for cell in cells):
            lines.append(f"| {said} | {' | '.join(cells)} |")
    return lines


def text_table(results: Results) -> list[str]:
    """E2E: loss, BLEU and ROUGE-L of all federated methods, and differences to LoRA."""
    named = {
        "memory": "prefix memory",
        "prefix": "key-value pairs",
        "lora": "LoRA",
        "full": "full fine-tuning",
    }
    lines = ["|  | seeds | loss | ROUGE-L | BLEU | BLEU less LoRA's, paired |", "|---|---|---|---|---|---|"]
    lora = results.at(method="lora")
    for method, said in named.items():
        there = results.at(method=method)
        if not there:
            continue
        cells = []
        for metric in ("loss", "rouge_l", "bleu"):
            mean, half = mean_and_interval(result.metrics[metric] for result in there)
            cells.append(f"{words.score(mean, metric)} {words.interval(half, metric)}".strip())
        found = None if method == "lora" else paired_difference(there, lora, "bleu")
        less = (
            "–"
            if found is None
            else f"{found[0]:+.1f}" + ("" if math.isnan(found[1]) else f" ± {found[1]:.1f}")
        )
        lines.append(f"| {said} | {len(there)} | {' | '.join(cells)} | {less} |")
    return lines


def picture(results: Results) -> str:
    """Accuracy against bytes sent in all, at Dirichlet 0.1: a colour a method, a symbol a data set."""
    points = [
        (method, name, there)
        for method in METHODS
        for name in SETS
        if (there := results.at(data=name, partition=SKEWED, method=method))
    ]
    sent = [_sent(there) for _, _, there in points]
    scores = [mean_and_interval(result.metrics["accuracy"] for result in there)[0] for _, _, there in points]
    x: Axis = logarithmic(min(sent) / 2, max(sent) * 2, words.byte_count)
    colours = {METHODS[method]: COLOURS[number] for number, method in enumerate(METHODS)}
    chart = Chart(
        x, linear(*value_range(scores, "accuracy")), "bytes sent in all, both ways", height=300,
        colours=colours | dict.fromkeys(SETS.values(), "#4a5568"),
    )  # fmt: skip
    symbols = dict(zip(SETS, SYMBOLS, strict=False))
    for (method, name, _), amount, score in zip(points, sent, scores, strict=True):
        said = METHODS[method]
        tip = f"{SETS[name]}: {score:.3f}, {words.byte_count(amount)}"
        chart.marks([Mark(x.place(amount), chart.y.place(score), tip)], said, symbols[name], said)
    for method in dict.fromkeys(method for method, _, _ in points):
        chart.entry(METHODS[method], METHODS[method], "", "bar")
    for name, said in SETS.items():
        chart.entry(said, said, "", symbols[name])
    return chart.file("Test accuracy at Dirichlet 0.1 against bytes sent in all") + "\n"


def _sent(results: Sequence[Result]) -> float:
    return mean_and_interval(result.bytes["up_total"] + result.bytes["down_total"] for result in results)[0]


def page(results: Results, texts: Results) -> str:
    """The page."""
    machines = sorted({str(result.machine["processor"]) for result in results.found})
    head = """# Federated prefix-tuning: claims and verdicts
Written by `python scripts/summary.py results docs/results` from the JSON of `experiments/all.toml`,
`experiments/prefix-memory.toml` and `experiments/e2e.toml`; each file has its command, seed and commit.

MiniLM, 100 clients, ten a round, 40 rounds, one local epoch; learning rates are the best of four by the
development split, with as many trials for each method. Figures are of the test split, with the state that was
best on the development split. Differences are in points of accuracy, paired by seed, ± half of the 95 %
interval, with the number of seeds in brackets."""
    lines = [
        head,
        f"Processors: {words.listed(machines)}.",
        "",
        "## Claims",
        "The prefix is a [prefix memory](../prefix.md), the default.",
        "",
        f"| claim | wanted | {' | '.join(SETS.values())} | verdict |",
        "|---|---|---|---|---|---|",
        *(claim.row() for claim in claims(results)),
        "",
        "## Test accuracy",
        *accuracy_table(results),
        "",
        "A probe is logistic regression on the frozen model's vectors. Its rows differ between partitions, "
        "as the clients' development parts do, which it does not see. scikit-learn's on all training "
        "rows, without this package, are in "
        "[prefix.md](../prefix.md#trec-6-after-forty-rounds-even-labels-too).",
        "",
        "![Test accuracy at Dirichlet 0.1 against bytes sent in all](quality-bytes.svg)",
        "",
        "## Text",
        "E2E with `builtin:lm`, 20 clients with even shares, 24 rounds, greedy answers on the test split.",
        "",
        *text_table(texts),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read results, and write the page and its picture."""
    parser = argparse.ArgumentParser(description="One page of claims, verdicts and figures.")
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    results = Results(arguments.results, ["prefix-memory", "prefix-memory-77", "all"])
    if not results.at(partition=SKEWED):
        parser.error(f"{arguments.results}: no results of experiments/prefix-memory.toml or all.toml")
    texts = Results(arguments.results, ["e2e"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "summary.md", page(results, texts))
    write_text(arguments.out / "quality-bytes.svg", picture(results))


if __name__ == "__main__":
    main()
