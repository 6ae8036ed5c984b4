"""Parts of a report: axes, charts, calibration and confusions, against figures made by hand."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.report import write_report
from fedcustom.report.axes import Axis, linear, logarithmic, round_numbers, value_range, whole
from fedcustom.report.calibration import calibration_error, reliability, reliability_charts, verdict
from fedcustom.report.confusion import confusions
from fedcustom.report.groups import group_runs
from fedcustom.report.plots import MOST_POINTS, by_client, by_round
from fedcustom.report.read import Prediction, read_runs
from fedcustom.report.svg import Chart, Mark
from helpers.report import Tags, small_run, write_run

# --- axes ---


def test_a_small_fall_is_no_cliff() -> None:
    low, high = value_range([0.912, 0.905], "accuracy")
    assert high - low == pytest.approx(0.108)  # a tenth, and 4 % at each end
    assert (low + high) / 2 == pytest.approx(0.9085)
    assert 0.007 / (high - low) < 0.07
    low, high = value_range([24.3, 25.0], "bleu")
    assert high - low == pytest.approx(10.8)
    low, high = value_range([2.0, 1.99], "loss")
    assert high - low == pytest.approx(0.25 * 2.0 * 1.08)
    low, high = value_range([0.03, 0.02], "loss")
    assert (low, high) == pytest.approx((0.0, 0.1))  # moved, so as not to begin below 0
    assert value_range([0.2, 0.7], "accuracy") == pytest.approx((0.18, 0.72))  # wider than the least


def test_a_range_stays_within_what_a_metric_can_be() -> None:
    assert value_range([0.999, 1.0], "accuracy") == pytest.approx((0.9, 1.0), abs=0.06)
    assert value_range([0.999, 1.0], "accuracy")[1] == 1.0
    assert value_range([0.0, 0.001], "accuracy") == pytest.approx((0.0, 0.1), abs=0.06)
    assert value_range([0.0, 0.001], "accuracy")[0] == 0.0
    assert value_range([math.nan], "accuracy")[0] == 0.0


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
    st.sampled_from(["accuracy", "loss", "clients_asked"]),
    st.floats(0, 3),
)
def test_ranges_show_all_values(values: list[float], metric: str, half: float) -> None:
    low, high = value_range(values, metric, [half] * len(values))
    assert low <= min(values) <= max(values) <= high
    assert high - low >= 0.0999
    assert low >= 0
    assert metric == "loss" or high <= 1


def test_wide_intervals_do_not_flatten_curves() -> None:
    low, high = value_range([0.2, 0.6], "accuracy", [5.0, math.nan])
    assert high - low == pytest.approx((0.4 + 2 * 0.1) * 1.08)


def test_ticks_are_round_numbers() -> None:
    assert round_numbers(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert [tick.text for tick in linear(0.85, 0.96).ticks] == [
        "0.86",
        "0.88",
        "0.90",
        "0.92",
        "0.94",
        "0.96",
    ]
    assert [tick.text for tick in whole(5).ticks] == ["0", "1", "2", "3", "4", "5"]
    assert [tick.text for tick in whole(100).ticks] == ["0", "20", "40", "60", "80", "100"]
    axis = logarithmic(3e5, 2e8, lambda value: f"{value:.0e}")
    assert [tick.text for tick in axis.ticks] == ["1e+06", "1e+07", "1e+08"]
    assert axis.place(1e7) == pytest.approx(axis.ticks[1].place)
    assert Axis(2, 6).place(3) == 0.25


# --- charts ---


class Elements(HTMLParser):
    """The elements of a chart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def test_places_in_a_chart() -> None:
    chart = Chart(Axis(0, 10), Axis(0, 2), "x", "y")
    chart.line([(0, 0), (5, 1), (10, 2)], "method-lora", "solid")
    chart.marks([Mark(0.5, 0.25, "<half>")], "method-lora", "square", 'a "name"')
    chart.box(0.1, 0.4, 0.2, 0.5, "method-lora", "box")
    found = Elements(chart.html())
    assert found.named("polyline")[0]["points"] == "0.0,1000.0 500.0,500.0 1000.0,0.0"
    (mark,) = found.named("use")
    assert (mark["x"], mark["y"], mark["href"], mark["data-tip"]) == ("50%", "75%", "#mark-square", "<half>")
    (box,) = found.named("rect")
    assert [box[key] for key in ("x", "y", "width", "height")] == ["10%", "50%", "30%", "30%"]
    assert 'a "name"' in [attributes.get("data-name") for attributes in found.named("g")]


def test_a_curve_of_many_rounds_answers_at_some_of_them(tmp_path: Path) -> None:
    groups = group_runs(read_runs([write_run(tmp_path / "run", rounds=500)]).finished)
    chart = by_round(groups, "accuracy")
    assert chart is not None
    marks = [mark for mark in Elements(chart).named("use") if mark["href"] == "#mark-hit"]
    assert 40 <= len(marks) <= 60
    assert marks[-1]["x"] == "100%"
    assert len((Elements(chart).named("polyline")[0]["points"] or "").split()) == 501


def test_of_many_clients_the_ends_are_points(tmp_path: Path) -> None:
    names = [f"author-{number}" for number in range(MOST_POINTS + 1)]
    place = write_run(tmp_path / "run", rounds=2, clients=names)
    groups = group_runs(read_runs([place]).finished)
    chart = by_client(groups, "accuracy")
    assert chart is not None
    tips = [mark["data-tip"] or "" for mark in Elements(chart).named("use")]
    assert len(tips) == 100
    scores = {name: values["accuracy"] for name, values in groups[0].runs[0].summary.clients.items()}
    assert tips[0].startswith(f"{min(scores, key=lambda name: scores[name])}: ")
    assert f"{np.mean(list(scores.values())):.3f}" in chart
    page = Tags(write_report([place], tmp_path / "report.html")).text
    assert "Of many clients only 50 at each end are points." in page
    assert "the 200 worst clients on its own test part; 201 more stand in summary.json" in page
    worst = sorted(scores, key=lambda name: scores[name])[:200]
    assert all(name in page for name in worst)
    assert (tmp_path / "report.html").stat().st_size < 400_000


# --- calibration ---


def predicted(label: str, prediction: str, probability: float | None = None) -> Prediction:
    return Prediction(prediction=prediction, label=label, probability=probability)


def test_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.95 and 0.99 in the last, 0.50 and 0.53 in the eighth (0.467, 0.533].
    lines = [
        predicted("a", "a", 0.95),
        predicted("a", "b", 0.99),
        predicted("b", "b", 0.50),
        predicted("b", "b", 0.53),
        predicted("b", "b"),  # no probability: not counted
    ]
    bins = reliability(lines)
    assert [(each.count, round(each.low * 15)) for each in bins if each.count] == [(2, 7), (2, 14)]
    expected = (2 * abs(1.0 - 0.515) + 2 * abs(0.5 - 0.97)) / 4
    assert calibration_error(bins) == pytest.approx(expected)
    assert f"Expected calibration error {expected:.3f}, over 15 bins of equal width and 4 test examples" in (
        verdict(bins)
    )
    bars = Elements(reliability_charts(bins, "method-lora")).named("rect")
    assert [bar["height"] for bar in bars] == ["100%", "50%", "82%", "82%"]  # accuracies, then counts
    assert math.isnan(calibration_error(reliability([])))


def test_calibration_error_against_arrays() -> None:
    random = np.random.default_rng(3)
    confidence = random.uniform(0, 1, 2000).round(6)
    right = random.uniform(size=2000) < confidence**2
    lines = [predicted("a", "a" if r else "b", float(c)) for c, r in zip(confidence, right, strict=True)]
    edges = np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(reliability(lines)) == pytest.approx(expected)


def test_edges_of_bins() -> None:
    lines = [predicted("a", "a", value) for value in (0.0, 1 / 15, 2 / 15, 1.0)]
    assert [each.count for each in reliability(lines)] == [2, 1, *[0] * 11, 0, 1]


# --- confusions ---


def test_few_labels_make_a_matrix() -> None:
    lines = [predicted("b", "a"), predicted("b", "b"), predicted("a", "a"), predicted("c", "a")]
    found = confusions(lines, ["b", "a", "unseen"])
    assert found is not None
    assert found.matrix is not None
    assert found.matrix.labels == ["b", "a", "c"]
    rows = {label: [(cell.count, cell.share) for cell in cells] for label, cells in found.matrix.rows}
    assert rows == {
        "b": [(1, 0.5), (1, 0.5), (0, 0.0)],
        "a": [(0, 0.0), (1, 1.0), (0, 0.0)],
        "c": [(0, 0.0), (1, 1.0), (0, 0.0)],
    }
    assert (found.total, found.wrong, found.kinds, found.pairs) == (4, 2, 2, [])
    assert confusions([Prediction(prediction="text")], []) is None


def test_many_labels_make_pairs(tmp_path: Path) -> None:
    names = [f"intent {number:02d}" for number in range(30)]
    lines = [predicted(name, name) for name in names for _ in range(3)]
    lines += [predicted(names[0], names[1])] * 5 + [predicted(names[2], names[3])] * 2
    lines += [predicted(names[4], names[5])] * 2 + [predicted(names[4], names[4])]
    found = confusions(lines, names)
    assert found is not None
    assert found.matrix is None
    assert [(pair.label, pair.predicted, pair.count) for pair in found.pairs] == [
        ("intent 00", "intent 01", 5),
        ("intent 02", "intent 03", 2),  # 2 of 5, before 2 of 6
        ("intent 04", "intent 05", 2),
    ]
    assert [pair.share for pair in found.pairs] == pytest.approx([5 / 8, 2 / 5, 2 / 6])
    rows = [{"text": "x", "label": line.label, "prediction": line.prediction} for line in lines]
    page = Tags(write_report([write_run(tmp_path / "run", predictions=rows)], tmp_path / "report.html"))
    assert f"9 of {len(lines)} predictions are wrong, in 3 different ways. All of them:" in page.text
    assert re.search(r"intent 00\s*intent 01\s*5\s*62 %", page.text)
    assert "reliability" not in page.plots()  # there are no probabilities


# --- the page ---


def test_the_title_names_model_and_data(tmp_path: Path) -> None:
    place = small_run(tmp_path / "run", 0.8, 0, data="/a/long/way/to/intents", model="./models/own/")
    page = write_report([place], tmp_path / "report.html").read_text()
    assert "<title>Customising own on intents</title>" in page
    assert "/a/long/way/to/intents" in page  # among the facts
    place = small_run(tmp_path / "run", 0.8, 0)
    page = write_report([place], tmp_path / "report.html").read_text()
    assert "<title>Customising builtin:minilm on builtin:docstrings</title>" in page
