"""The commands as a user would call them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcustom
from fedcustom import load
from fedcustom.cli.console import command_line
from fedcustom.cli.progress_bar import ProgressDisplay
from fedcustom.core.errors import RunError
from fedcustom.core.files import read_json
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe, to_toml


@pytest.fixture
def recipe_file(small: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(to_toml(load_recipe(small)))
    return path


def test_run_report_predict_export(command: Any, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = command("run", recipe_file, "--out", out, "--set", "rounds.count=3")
    assert result.code == 0, result.error
    assert "round 3/3" in result.error
    assert "accuracy" in result.error
    assert "federated prefix" in result.out
    assert f"run: {out}" in result.out
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "summary.json").read_text())["rounds"] == 3

    again = command("run", recipe_file, "--out", out, "--set", "rounds.count=3")
    assert again.code == 0
    assert "nothing to do" in again.error

    one = command("predict", out, "the old cat")
    label, probability = one.out.split()
    assert label in ("animal", "food", "place")
    assert 0 < float(probability) <= 1

    inputs = tmp_path / "inputs.jsonl"
    inputs.write_text('{"text": "the old cat"}\n{"text": "bread"}\n')
    many = command("predict", out, "--input", inputs)
    answers = [json.loads(line) for line in many.out.splitlines()]
    assert answers[0]["label"] == label
    assert len(answers) == 2
    exact = load(out).predict(["the old cat", "bread"])
    for shown, full in zip(answers, exact, strict=True):
        assert shown["probability"] == round(full["probability"], 4) != full["probability"]
        assert shown["probabilities"] == {
            name: round(share, 4) for name, share in full["probabilities"].items()
        }
    (tmp_path / "inputs.txt").write_text("the old cat\nbread\n")
    assert command("predict", out, "--input", tmp_path / "inputs.txt").out == many.out

    exported = command("export", out, "--to", tmp_path / "model")
    assert exported.code == 0
    assert (tmp_path / "model" / "modeling_prefix_memory.py").exists()
    assert command("export", out, "--to", tmp_path / "model").code == 2

    page = command("report", out, "--out", tmp_path / "page.html")
    assert page.code == 0
    assert (tmp_path / "page.html").exists()


def test_compare_runs_what_is_missing(command: Any, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    arguments = [
        "compare",
        recipe_file,
        "--methods",
        "prefix,lora",
        "--baselines",
        "centralised,local",
        "--out",
        out,
    ]
    first = command(*arguments)
    assert first.code == 0, first.error
    names = {str(path.parent.relative_to(out)) for path in out.rglob("summary.json")}
    probes, methods = ("centralised-probe", "probe"), ("prefix", "lora", "centralised-prefix", "local-prefix")
    assert names == {f"{name}/seed-0" for name in (*probes, *methods)}
    begun = {path.parent.parent.name: path.stat().st_ctime_ns for path in out.rglob("summary.json")}
    assert tuple(sorted(begun, key=lambda name: begun[name])[:2]) == probes  # they are there early
    for name in (
        *("centralised probe", "federated probe", "untuned"),
        *("centralised prefix", "federated prefix", "federated lora", "local prefix"),
    ):
        assert name in " ".join(first.out.split()).lower(), name
    assert (out / "report.html").exists()
    second = command(*arguments, "--seeds", "2")
    assert second.error.count("nothing to do") == 6
    assert len(list(out.rglob("summary.json"))) == 12


def test_the_probe_is_logistic_regression(
    command: Any, small: dict[str, Any], recipe_file: Path, tmp_path: Path
) -> None:
    """Its rows are those of the probe run by itself, federated as accurate as centralised; a method that it
    is named among is not run twice.
    """
    out = tmp_path / "compared"
    assert command("compare", recipe_file, "--methods", "probe", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["centralised-probe", "probe", "report.html"]
    found = {
        name: json.loads((out / name / "seed-0" / "summary.json").read_text())
        for name in ("centralised-probe", "probe")
    }
    by_hand = fedcustom.run({**small, "method": {"name": "probe"}}, out=tmp_path / "alone")
    assert found["probe"]["metrics"] == by_hand.summary["metrics"]
    assert found["probe"]["rounds"] == found["centralised-probe"]["rounds"] == 1
    accuracies = [summary["metrics"]["accuracy"] for summary in found.values()]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.051)  # 2 of 40 texts


def test_where_there_is_no_probe(
    command: Any, recipe_file: Path, tmp_path: Path, generation: dict[str, Any]
) -> None:
    arguments = ("compare", recipe_file, "--methods", "prefix", "--set", "rounds.count=1", "--out")
    left_out = command(*arguments, tmp_path / "none", "--no-probe")
    assert (left_out.code, "probe" in left_out.error) == (0, False)
    assert [path.name for path in (tmp_path / "none").iterdir() if path.is_dir()] == ["prefix"]
    robust = command(*arguments, tmp_path / "robust", "--set", "aggregation.rule=median")
    assert robust.code == 0
    reason = "no federated probe: needs aggregation.rule = 'mean' and aggregation.correction = 'none'"
    assert reason in robust.error.splitlines()
    assert {path.name for path in (tmp_path / "robust").iterdir()} == {
        "prefix", "centralised-probe", "report.html",
    }  # fmt: skip
    texts = tmp_path / "texts.toml"
    texts.write_text(to_toml(load_recipe({**generation, "rounds": {"count": 1}})))
    alone = ("compare", texts, "--methods", "prefix", "--no-probe", "--out", tmp_path / "texts")
    copied = command(*alone)
    assert (copied.code, "probe" in copied.error) == (0, False)
    assert "copy" in [line.split()[0] for line in copied.out.splitlines() if line]
    assert [path.name for path in (tmp_path / "texts").iterdir() if path.is_dir()] == ["prefix"]


def test_texts_are_held_against_the_untuned_model(
    command: Any, tmp_path: Path, generation: dict[str, Any]
) -> None:
    """Zero-shot and few-shot, each in a run of its own, with the recipe's number of examples."""
    recipe = {
        **generation,
        "rounds": {"count": 1},
        "attack": {"kind": "sign_flip"},
        "compare": {"untuned": {"method": {"shots": 1}}, "centralised": {"training": {"batch_size": 2}}},
    }
    texts, out = tmp_path / "texts.toml", tmp_path / "compared"
    texts.write_text(to_toml(load_recipe(recipe)))
    done = command("compare", texts, "--methods", "lora", "--out", out)
    assert done.code == 0, done.error
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"lora", "zero-shot", "few-shot"}
    rows = {line.split("  ")[0].strip(): line for line in done.out.splitlines()}
    assert {"zero-shot", "few-shot (1)", "federated lora", "untuned", "copy"} <= rows.keys()
    found = {
        name: json.loads((out / name / "seed-0" / "summary.json").read_text())
        for name in ("lora", "zero-shot", "few-shot")
    }
    assert found["zero-shot"]["metrics"] == found["lora"]["untuned"]
    by_hand = fedcustom.run(
        {**generation, "method": {"name": "untuned", "shots": 1}, "baseline": "centralised"},
        out=tmp_path / "by-hand",
    )
    assert found["few-shot"]["metrics"] == by_hand.summary["metrics"]
    bad = load_recipe({**recipe, "compare": {"untuned": {"method": {"shot": 1}}}})
    texts.write_text(to_toml(bad))
    refused = command("compare", texts, "--methods", "lora", "--out", out)
    said = "no {}: compare.untuned: method.shot: unknown setting; allowed: name, shots; did you mean 'shots'?"
    assert [line for line in refused.error.splitlines() if line.startswith("no ")] == [
        said.format(name) for name in ("zero-shot", "few-shot")
    ]


def test_a_probe_that_fails_is_no_failure_of_the_others(
    command: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedcustom.experiment.runner as experiments

    plain = experiments.run_recipe

    def failing(recipe: Any, *rest: Any, **more: Any) -> Any:
        if recipe.method.name == "probe":
            raise RunError("out of luck")
        return plain(recipe, *rest, **more)

    monkeypatch.setattr(experiments, "run_recipe", failing)
    result = command(
        "compare", recipe_file, "--methods", "prefix", "--set", "rounds.count=1", "--out", tmp_path / "out"
    )
    assert result.code == 0
    assert "no centralised-probe, seed 0: out of luck" in result.error.splitlines()
    assert "federated prefix" in result.out


def test_compare_goes_on_past_a_method_that_fails(command: Any, recipe_file: Path, tmp_path: Path) -> None:
    with recipe_file.open("a") as file:
        file.write("\n[compare.soft_prompt.method]\nlength = 63\n")
    cells = ("compare", recipe_file, "--methods", "soft_prompt,prefix", "--no-probe", "--out")
    result = command(*cells, tmp_path / "out")
    assert result.code == 2
    assert "error: soft_prompt, seed 0: data.max_length = 24" in result.error
    assert "federated prefix" in result.out
    apart = command(*cells, tmp_path / "apart", "--jobs", 2)
    assert apart.code == 2
    assert "error: soft_prompt, seed 0: data.max_length = 24" in apart.error
    assert any(line.startswith("prefix, seed 0: round 2/2") for line in apart.error.splitlines())
    one, other = (read_json(tmp_path / at / "prefix" / "seed-0" / "summary.json") for at in ("out", "apart"))
    assert one["metrics"] == pytest.approx(other["metrics"], abs=1e-4)
    quiet = command(*cells, tmp_path / "quiet", "--jobs", 2, "--quiet")
    assert quiet.error.startswith("error: soft_prompt")


def test_a_comparison_does_not_begin_beside_runs_of_another_task(
    command: Any, recipe_file: Path, tmp_path: Path, generation: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    arguments = ("--methods", "prefix", "--no-probe", "--set", "rounds.count=1", "--out", out)
    assert command("compare", recipe_file, *arguments).code == 0
    texts = tmp_path / "texts.toml"
    texts.write_text(to_toml(load_recipe(generation)))
    result = command("compare", texts, *arguments)
    assert (result.code, result.error) == (
        2, f"error: {out}: holds runs of classification, not generation; name another --out\n"
    )  # fmt: skip


def test_quiet(command: Any, recipe_file: Path, tmp_path: Path) -> None:
    result = command("run", recipe_file, "--out", tmp_path / "run", "--quiet")
    assert result.error == ""
    assert result.out.splitlines() == [
        f"run: {tmp_path / 'run'}",
        f"report: {tmp_path / 'run' / 'report.html'}",
    ]


def interrupted(command: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[str]:
    """Stop a command by Ctrl-C after its first round; the words of what it says to go on with."""

    def stop(self: ProgressDisplay, row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressDisplay, "on_round_end", stop)
        stopped = command(*arguments)
    assert stopped.code == 130
    said = stopped.error.splitlines()[-1]
    assert said.startswith("stopped; go on with: fedcustom ")
    return shlex.split(said.removeprefix("stopped; go on with: "))


def test_what_is_said_after_ctrl_c_can_be_pasted(
    command: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a folder's run"
    arguments = ["run", recipe_file, "--out", out, "--set", "method.length=5", "--set", "data.text={text} !"]
    words = interrupted(command, monkeypatch, *arguments)
    assert words == [
        *("fedcustom", "run", str(recipe_file), "--set", "method.length=5", "--set", "data.text={text} !"),
        *("--out", str(out), "--resume"),
    ]
    assert command(*arguments[:-4], "--resume").code == 2  # without --set it would be another recipe's
    gone_on = command(*words[1:])
    assert gone_on.code == 0, gone_on.error
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2


def test_a_comparison_stopped_by_ctrl_c_says_its_whole_command(
    command: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compared"
    options = [
        "--set",
        "method.length=5",
        "--methods",
        "prefix",
        "--seeds",
        "2",
        "--out",
        str(out),
        "--no-probe",
    ]
    words = interrupted(command, monkeypatch, "compare", recipe_file, *options, "--quiet")
    assert words == ["fedcustom", "compare", str(recipe_file), *options]
    assert command(*words[1:]).code == 0
    assert len(list(out.rglob("summary.json"))) == 2


def test_a_command_as_it_is_pasted() -> None:
    options = {
        "--out": Path("a b"),
        "--port": None,
        "--only": ["x=1", "y=it's"],
        "--resume": True,
        "-q": False,
    }
    assert command_line("run", Path("r.toml"), overrides=["data.text=a b"], options=options) == (
        "fedcustom run r.toml --set 'data.text=a b' --out 'a b' --only x=1 --only 'y=it'\"'\"'s' --resume"
    )
    assert command_line("run", "r.toml") == "fedcustom run r.toml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.toml"], "none.toml: no such recipe"),
        (["run", "{recipe}", "--set", "training.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["run", "{recipe}", "--set", "data.label=lable"], "did you mean 'label'?"),
        (["run", "{recipe}", "--set", "data.source=./none"], "./none: no such file or folder"),
        (
            ["run", "{recipe}", "--set", "method.length=64", "--set", "method.kind=kv"],
            "has a context of 64 positions",
        ),
        (["run", "{recipe}", "--out", "/dev/null/x"], "error: Not a directory"),
        (["compare", "{recipe}", "--methods", "prefix,prompt"], "--methods: unknown method 'prompt'"),
        (["compare", "{recipe}", "--baselines", "central"], "did you mean 'centralised'?"),
        (["compare", "{recipe}", "--methods", ""], "nothing to run"),
        (["report", "{folder}"], "no run in or below this folder"),
        (["predict", "{folder}", "text"], "holds no run"),
        (["predict", "{folder}"], "give either one text or --input FILE"),
        (["export", "{folder}", "--to", "{folder}/x"], "holds no run"),
        (["recipe", "none.toml"], "no such recipe"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    command: Any, recipe_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    before = set(tmp_path.rglob("*"))
    result = command(*(a.format(recipe=recipe_file, folder=folder) for a in arguments))
    assert result.code == 2
    assert message in " ".join(result.error.split())
    lines = [line for line in result.error.splitlines() if not line.startswith("reading the data (")]
    assert [line.startswith("error: ") for line in lines] == [True]  # on a slow machine after a sign of life
    assert result.out == ""
    assert {path for path in tmp_path.rglob("*") if "runs" not in path.parts} == before


def test_unknown_options_are_usage_errors(command: Any) -> None:
    result = command("run", "--fast")
    assert result.code == 2
    assert "No such option" in result.error


def test_recipe_prints_a_recipe_that_runs(command: Any, tmp_path: Path) -> None:
    printed = command("recipe")
    assert printed.code == 0
    (tmp_path / "start.toml").write_text(printed.out)
    assert load_recipe(tmp_path / "start.toml") == load_recipe({})
    complete = command("recipe", tmp_path / "start.toml").out
    assert complete == to_toml(resolved(load_recipe({}))) != printed.out
    (tmp_path / "start.toml").write_text(complete)
    assert command("recipe", tmp_path / "start.toml").out == complete
    everything = command("recipe", "--help-all").out
    for name in ("training.learning_rate", "clients.alpha", "method.length", "aggregation.rule"):
        assert name in everything


def test_too_little_memory_is_one_line(
    command: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcustom.federated.simulation.load_for", lambda *_: torch.empty(2**50))
    result = command("run", recipe_file, "--out", tmp_path / "run")
    assert result.code == 2
    assert "error: out of memory: " in result.error
    assert "lower training.batch_size or data.max_length" in result.error
    assert "Traceback" not in result.error


@pytest.mark.slow
def test_a_full_disk(recipe_file: Path, tmp_path: Path) -> None:
    """Files may grow to 2,300 bytes only, as on a disk that fills up while a checkpoint is written."""
    code = (
        "import resource, sys\n"
        "from fedcustom import api, report\n"
        "from fedcustom.cli import app\n"
        "import fedcustom.federated.run, transformers, peft\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2300, 2300))\n"
        f"sys.argv = ['fedcustom', 'run', {str(recipe_file)!r}, '--out', {str(tmp_path / 'run')!r}]\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("round-*"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_comparison_goes_on_past_a_cut_line(command: Any, recipe_file: Path, tmp_path: Path) -> None:
    """A run that was killed while it wrote a line goes on, though another one is finished."""
    arguments = ("compare", recipe_file, "--methods", "lora", "--no-probe", "--set", "rounds.count=2")
    assert command(*arguments, "--out", tmp_path / "out").code == 0
    other = tmp_path / "out" / "prefix" / "seed-0"
    more = ("compare", recipe_file, "--methods", "lora,prefix", "--no-probe", "--set", "rounds.count=2")
    assert command(*more, "--out", tmp_path / "out").code == 0
    (other / "summary.json").unlink()
    with (other / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "coh')
    assert command(*more, "--out", tmp_path / "out").code == 0
    assert (other / "summary.json").exists()
