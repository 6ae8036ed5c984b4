"""Reports from synthetic run directories."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from fedcustom.core.errors import RunError
from fedcustom.report import comparison, comparison_table, write_report
from fedcustom.report import formatting as words
from fedcustom.report.groups import group_runs, mean_and_interval
from fedcustom.report.read import read_runs
from fedcustom.report.traffic import traffic
from helpers.browser import found_by, needs_chromium
from helpers.report import METHODS, PACKAGES, Tags, classified, generated, lines, small_run, write_run


def write_comparison(root: Path, seeds: int = 3, clients: Sequence[str] = PACKAGES) -> Path:
    """Centralised prefix, federated prefix, lora, soft_prompt and full, and local prefix."""
    pairs = [("prefix", "centralised"), *((method, "federated") for method in METHODS), ("prefix", "local")]
    for method, baseline in pairs:
        for seed in range(seeds):
            write_run(
                root / f"{method}-{baseline}" / f"seed-{seed}",
                method=method,
                baseline=baseline,
                seed=seed,
                clients=clients,
                predictions=classified(seed),
                left_out={"torch": "loss is not finite"} if (method, seed) == ("lora", 1) else None,
            )
    return root


def test_comparison_has_means_and_t_intervals(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.80, 0.84, 0.85)):
        small_run(tmp_path / f"prefix/seed-{seed}", accuracy, seed)
    small_run(tmp_path / "lora/seed-0", 0.9, 0, method="lora", peak_memory_bytes=None)
    frame = comparison([tmp_path]).set_index("method")
    prefix = frame.loc["prefix"]
    assert prefix["accuracy"] == pytest.approx(0.83)
    # standard deviation sqrt((0.03^2 + 0.01^2 + 0.02^2) / 2), over sqrt(3), times t(0.975, 2) = 4.302653
    half = math.sqrt(0.0014 / 2) / math.sqrt(3) * 4.302653
    assert prefix["accuracy_interval"] == pytest.approx(half, rel=1e-6)
    assert prefix["worst_client_accuracy"] == pytest.approx(0.63)
    assert prefix["worst_client_accuracy_interval"] == pytest.approx(half, rel=1e-6)
    assert prefix["untuned_accuracy"] == pytest.approx(0.12)
    assert prefix["seeds"] == 3
    payload = (73_728 + 3465) * 4 + 900
    assert prefix["bytes_up_per_client_round"] == payload
    assert prefix["bytes_up_total"] + prefix["bytes_down_total"] == 2 * payload * len(PACKAGES) * 3
    assert prefix["seconds"] == pytest.approx(61.2 + 18 + 1)
    lora = frame.loc["lora"]
    assert lora["seeds"] == 1
    assert math.isnan(lora["accuracy_interval"])
    assert math.isnan(lora["peak_memory_bytes"])


def test_mean_and_interval_of_few_values() -> None:
    assert mean_and_interval([2.0])[0] == 2.0
    assert math.isnan(mean_and_interval([2.0])[1])
    assert math.isnan(mean_and_interval([])[0])
    assert math.isnan(mean_and_interval([1.0, math.nan])[0])
    # t(0.975, 1) = 12.7062, standard error 1
    assert mean_and_interval([1.0, 3.0]) == pytest.approx((2.0, 12.7062), rel=1e-5)


def test_rows_are_sorted_by_baseline_then_quality(tmp_path: Path) -> None:
    small_run(tmp_path / "a", 0.9, 0, baseline="local")
    small_run(tmp_path / "b", 0.7, 0, method="lora")
    small_run(tmp_path / "c", 0.8, 0, method="ia3")
    small_run(tmp_path / "d", 0.6, 0, baseline="centralised")
    small_run(tmp_path / "e", math.nan, 0, method="full")
    frame = comparison([tmp_path])
    assert list(zip(frame["baseline"], frame["method"], strict=True)) == [
        ("centralised", "prefix"),
        ("federated", "ia3"),
        ("federated", "lora"),
        ("federated", "full"),
        ("local", "prefix"),
    ]


def test_runs_with_different_settings_are_not_averaged(tmp_path: Path) -> None:
    for place, (alpha, seed) in enumerate([(0.1, 0), (0.1, 1), (10.0, 0)]):
        recipe = f"seed = {seed}\n[clients]\nalpha = {alpha}\n[model]\ndevice = 'cpu'\n"
        small_run(tmp_path / str(place), 0.8, seed, recipe=recipe)
    frame = comparison([tmp_path]).sort_values("variant")
    assert list(frame["variant"]) == ["clients.alpha=0.1", "clients.alpha=10.0"]
    assert list(frame["seeds"]) == [2, 1]


def test_summary_sentences(tmp_path: Path) -> None:
    for seed in range(2):
        small_run(tmp_path / f"c{seed}", 0.920, seed, baseline="centralised")
        small_run(tmp_path / f"p{seed}", 0.912 + 0.0001 * seed, seed)
        small_run(tmp_path / f"f{seed}", 0.90, seed, method="full")
    text = " ".join(Tags(write_report([tmp_path], tmp_path / "report.html")).text.split())
    ratio = round(((22_713_216 + 3465) * 4 + 900) / ((73_728 + 3465) * 4 + 900))
    assert (
        "Federated prefix reaches 0.912 accuracy on the test split, 0.8 points below centralised prefix, "
        f"and sends {ratio} times fewer bytes than full fine-tuning." in text
    )
    assert "Second is federated full fine-tuning, 1.2 points behind." in text
    assert "0.000 below" not in text


def test_bytes_at_equal_quality(tmp_path: Path) -> None:
    def history(accuracies: list[float], each: int) -> str:
        return lines(
            [{"round": 0, "development": {"accuracy": 0.1}}]
            + [
                {
                    "round": number,
                    "development": {"accuracy": accuracy},
                    "bytes_up_total": number * each,
                    "bytes_down_total": number * each,
                }
                for number, accuracy in enumerate(accuracies, start=1)
            ]
        )

    for method, accuracies, each in (
        ("distillation", [0.5, 0.7, 0.6], 1_000),
        ("full", [0.3, 0.6, 0.71], 1_000_000),
        ("lora", [0.3, 0.6, 0.65], 100_000),
    ):
        total = len(accuracies) * each
        place = write_run(
            tmp_path / method, method=method, metrics={"accuracy": accuracies[-1]},
            bytes={"up_total": total, "down_total": total},
        )  # fmt: skip
        (place / "metrics.jsonl").write_text(history(accuracies, each))
    said = words.findings(group_runs(read_runs([tmp_path]).finished), "accuracy")
    start = "For 0.700 accuracy on the development split distillation sent 4\N{NO-BREAK SPACE}kB in all; "
    assert f"{start}full fine-tuning 6\N{NO-BREAK SPACE}MB (1500 times)." in said
    assert f"{start}LoRA did not get there with 600\N{NO-BREAK SPACE}kB." in said


def test_clients_without_a_test_part_are_counted(tmp_path: Path) -> None:
    def fact(place: Path) -> str:
        text = Tags(write_report([place], tmp_path / "report.html")).text
        found = re.search(r"Clients(.*?)\n", text)
        assert found is not None
        return found[1]

    place = write_run(tmp_path / "run", clients=["a", "b", "c"], client_count=20)
    assert fact(place) == "20 (3 with a test part)"
    summary = json.loads((place / "summary.json").read_text())
    (place / "summary.json").write_text(json.dumps(summary | {"client_count": 3}))
    assert fact(place) == "3"
    none = {"clients": {}, "client_mean": {}, "worst_client": {}}
    (place / "summary.json").write_text(json.dumps(summary | {"client_count": 3} | none))
    assert fact(place) == "3 (none with a test part)"
    summary.pop("client_count")  # of an older version: those that were asked
    (place / "summary.json").write_text(json.dumps(summary | {"clients": {"a": {"accuracy": 1.0}}}))
    assert fact(place) == "3 (1 with a test part)"


def test_overlapping_intervals_are_said(tmp_path: Path) -> None:
    for seed in range(3):
        small_run(tmp_path / f"p{seed}", 0.9 + 0.02 * seed, seed)
        small_run(tmp_path / f"l{seed}", 0.89 + 0.02 * seed, seed, method="lora")
    assert "95% intervals overlap" in Tags(write_report([tmp_path], tmp_path / "report.html")).text


def test_page_holds_everything_itself(tmp_path: Path) -> None:
    page = Tags(write_report([write_comparison(tmp_path / "runs")], tmp_path / "deep" / "report.html"))
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert not re.search("^(https?:)?//", attributes.get(name) or ""), (tag, attributes)
        assert tag not in ("img", "iframe", "object", "embed", "base")
    assert "@import" not in (tmp_path / "deep" / "report.html").read_text().split("</style>")[0]
    assert len(page.scripts) == 1
    assert (tmp_path / "deep" / "report.html").stat().st_size < 400_000
    assert page.plots() == {"rounds", "bytes", "clients", "reliability", "timeline"}
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "caption" for tag, _ in page.tags)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    for text in ("Federated soft prompt", "loss is not finite", "2–4, 9", "Untuned model", "networkx"):
        assert text in page.text


PAYLOAD = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 1'>"


def hostile(place: Path) -> Path:
    rows = [{"text": PAYLOAD, "label": PAYLOAD, "prediction": PAYLOAD + "2", "probability": 0.5}]
    return write_run(
        place,
        method=PAYLOAD,
        clients=[PAYLOAD, "<a href='https://example.com'>link</a>", "\u2028", "numpy"],
        predictions=rows,
        left_out={PAYLOAD: PAYLOAD},
        model=PAYLOAD,
        data=PAYLOAD,
        recipe=f'a = "{PAYLOAD}"\n',
    )


def test_what_comes_from_files_is_inert(tmp_path: Path) -> None:
    run = hostile(tmp_path / "run")
    (run / "warnings.log").write_text(PAYLOAD)
    (run / "environment.json").write_text(json.dumps({PAYLOAD: PAYLOAD}))
    page = Tags(write_report([run], tmp_path / "report.html"))
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{}]
    assert not any(tag in ("img", "a") or "onerror" in attributes for tag, attributes in page.tags)
    assert page.text.count("window.injected = 1") > 10
    tips = [attributes["data-tip"] or "" for _, attributes in page.tags if "data-tip" in attributes]
    assert any(PAYLOAD in tip for tip in tips)  # as an attribute's text


def test_policy_lets_only_the_own_scripts_run(tmp_path: Path) -> None:
    page = Tags(write_report([write_run(tmp_path / "run")], tmp_path / "report.html"))
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_generation_run(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", task="generation", predictions=generated())
    page = Tags(write_report([place], tmp_path / "report.html"))
    assert "By the riverside, The Eagle 9 serves" in page.text
    assert "The Eagle 10" not in page.text
    assert page.plots() == {"rounds", "bytes", "clients"}
    assert re.search(r"Federated prefix reaches 6\d\.\d ROUGE-L on the test split", page.text)


def test_clients_scored_by_another_metric_than_the_first(tmp_path: Path) -> None:
    only = {"loss": 1.5}
    clients = {name: {"test_examples": 5, "loss": 1.5} for name in PACKAGES}
    place = write_run(
        tmp_path / "run", task="generation", clients=PACKAGES, client_mean=only, worst_client=only
    )
    summary = json.loads((place / "summary.json").read_text()) | {"clients": clients}
    (place / "summary.json").write_text(json.dumps(summary))
    text = Tags(write_report([place], tmp_path / "report.html")).text
    assert "Over clients (loss)" in text
    assert "ROUGE-L was not measured here; loss is shown." in text


def test_single_run_with_bare_files(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", seed=3)
    for name in ("recipe.toml", "environment.json", "predictions.jsonl", "metrics.jsonl"):
        (place / name).unlink()
    page = Tags(write_report([place], tmp_path / "report.html"))
    assert "One seed each" in page.text
    assert page.plots() == {"clients"}


def test_unfinished_runs_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "done")
    (write_run(tmp_path / "begun", rounds=4) / "summary.json").unlink()
    page = Tags(write_report([tmp_path], tmp_path / "report.html"))
    assert "1 run is unfinished" in page.text
    assert "begun" in page.text
    assert len(comparison([tmp_path])) == 1
    with pytest.raises(RunError, match=r"begun: no finished run \(no summary.json; 1 unfinished\)"):
        comparison([tmp_path / "begun"])


def test_the_same_run_named_twice_counts_once(tmp_path: Path) -> None:
    place = write_run(tmp_path / "runs" / "run")
    assert list(comparison([place, tmp_path / "runs"])["seeds"]) == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"round": 0}\n{"round": 1,\n', r"metrics\.jsonl, line 2: Invalid JSON"),
        ("metrics.jsonl", '{"development": {}}\n', r"metrics\.jsonl, line 1: round: Field required"),
        ("summary.json", "{}", r"summary\.json: method: Field required"),
        ("recipe.toml", "a = ", r"recipe\.toml: Invalid value"),
        ("predictions.jsonl", "[]\n", r"predictions\.jsonl, line 1: "),
        ("environment.json", "[]", r"environment\.json: "),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (write_run(tmp_path / "run") / name).write_text(content)
    with pytest.raises(RunError, match=message) as raised:
        write_report([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_folders_without_runs_and_mixed_tasks(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder"):
        comparison([tmp_path / "none"])
    with pytest.raises(RunError, match="no run in or below this folder"):
        comparison([tmp_path])
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", task="generation")
    with pytest.raises(RunError, match="different tasks cannot share a report: classification, generation"):
        comparison([tmp_path])


def test_terminal_table(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    console = Console(width=110, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(comparison_table([tmp_path]))
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 110
    names = [line.split("  ")[0] for line in lines[2:-1]]
    assert names[0] == "centralised prefix"
    assert names[-2:] == ["local prefix", "untuned"]
    assert set(names[1:-2]) == {f"federated {method}" for method in METHODS}
    assert "±" in lines[2]


def test_words() -> None:
    assert [words.byte_count(value) for value in (0, 950, 309_600, 9.996e5, 14.5e9)] == [
        "0\u00a0B",
        "950\u00a0B",
        "310\u00a0kB",
        "1\u00a0MB",
        "14.5\u00a0GB",
    ]
    assert [words.count(value) for value in (12, 73_728, 22_713_216)] == ["12", "73.7k", "22.7M"]
    assert [words.duration(value) for value in (61.2, 600, 10_800)] == [
        "61.2\u00a0s",
        "10.0\u00a0min",
        "3.0\u00a0h",
    ]
    assert words.rounds([9, 2, 3, 4]) == "2–4, 9"


PROBE = """<!doctype html><body><iframe id="page" src="{name}" style="border:0" width="{width}" height="800">
</iframe><script>
onload = () => setTimeout(() => {{
  const page = document.getElementById("page").contentWindow, root = page.document.documentElement;
  page.document.querySelector("input[value=loss]").click();
  for (const hidden of page.document.querySelectorAll("details")) hidden.open = true;
  const found = {{overflow: root.scrollWidth - root.clientWidth, width: root.clientWidth,
    plots: [...page.document.querySelectorAll(".plot")].filter((plot) => plot.clientHeight > 50).length,
    injected: page.injected ?? null,
    outside: [...page.document.querySelectorAll(".chart, .chart *")].filter(
      (part) => part.getBoundingClientRect().right > root.clientWidth + 1).length,
    hints: page.document.querySelector(".scroll").classList.contains("wider"), tip: ""}};
  const mark = page.document.querySelector(".plot:not([hidden]) [data-tip]");
  const box = mark.getBoundingClientRect();
  mark.closest(".area").dispatchEvent(new PointerEvent("pointermove", {{
    clientX: box.x + 2, clientY: box.y + 2, bubbles: true}}));
  found.tip = page.document.querySelector(".tip").textContent;
  document.body.setAttribute("data-found", JSON.stringify(found));
}}, 4000);
</script></body>"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("case", ["comparison", "hostile"])
def test_page_in_a_browser(tmp_path: Path, width: int, case: str) -> None:
    runs = tmp_path / "runs"
    write_comparison(runs, seeds=2) if case == "comparison" else hostile(runs)
    write_report([runs], tmp_path / "report.html")
    probe = PROBE.format(name="report.html", width=width)
    found = found_by(probe, tmp_path)
    assert found.pop("tip").endswith("round 0: 2.200 ± 0.000" if case == "comparison" else "round 0: 2.200")
    assert found == {
        "overflow": 0, "width": width, "plots": 5, "injected": None, "outside": 0, "hints": width < 600,
    }  # fmt: skip


def test_rounds_missed_and_bytes_stand_client_by_client(tmp_path: Path) -> None:
    place = write_run(tmp_path / "run", clients=["a", "b"], rounds=2)
    history = [
        {"round": 1, "cohort": ["a", "b"], "left_out": {}, "bytes_up": {"a": 100, "b": 100}},
        {"round": 2, "cohort": ["a", "b"], "left_out": {"b": "not connected"}, "bytes_up": {"a": 200}},
    ]
    rows = [{**row, "bytes_down": {"a": 15, "b": 15}, "development": {"accuracy": 0.5}} for row in history]
    (place / "metrics.jsonl").write_text(lines(rows))
    found = {line.client: line for line in traffic(group_runs(read_runs([place]).finished))}
    assert (found["a"].asked, found["a"].missed, found["a"].up, found["a"].down) == (
        2,
        0,
        "300\xa0B",
        "30\xa0B",
    )
    assert (found["b"].asked, found["b"].missed, found["b"].up, found["b"].down) == (
        2,
        1,
        "100\xa0B",
        "30\xa0B",
    )
    page = write_report([place], tmp_path / "page.html").read_text()
    assert "Clients, rounds and bytes" in page
