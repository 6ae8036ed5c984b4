"""The benchmark's arithmetic, and that all engines get the same work; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from benchmarks.cases import aggregation, gpu, instruct, peers_job, scaling, secure_sums
from benchmarks.environments import PEERS, peer
from benchmarks.harness import (
    OURS,
    Engine,
    Measured,
    alternate,
    compare,
    distance,
    own_engines,
    spread,
    steady,
)
from benchmarks.memory import watched
from benchmarks.page import least_ratio, write_page
from benchmarks.profile import Phases
from safetensors.torch import save_file


def test_spread_is_median_and_quartiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.5, 9.0]
    found = spread(values)
    assert found["median"] == pytest.approx(np.median(values))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(values, [25, 75])))
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_the_first_round_stands_apart() -> None:
    assert steady([10.0, 1.0, 3.0]) == 2.0
    assert steady([10.0]) == 10.0


def test_ratios_are_made_repetition_by_repetition() -> None:
    ours = Measured(rounds=[[9, 1, 1], [9, 4, 4], [9, 3, 3]], startup=[1, 2, 3], losses=[2.0, 1.0])
    other = Measured(rounds=[[8, 2, 2], [8, 4, 4], [8, 12, 12]], startup=[4, 4, 4], losses=[2.0, 0.8])
    rows = compare({OURS: ours, "other": other, "broken": Measured(problem="no")})
    assert rows["other"]["ratio"] == spread([0.5, 1.0, 0.25])
    assert rows["other"]["seconds"]["median"] == 4
    assert rows["other"]["startup"]["median"] == 4
    assert rows["other"]["loss_difference"] == pytest.approx(0.25)
    assert rows["broken"] == {"problem": "no"}


def test_processor_time_leaves_out_the_first_round_and_the_last() -> None:
    ours = Measured(rounds=[[1, 1, 1, 1]], startup=[1], processor=[[9, 1, 2, 9]])
    other = Measured(rounds=[[1, 1, 1, 1]], startup=[1], processor=[[5, 2, 4, 5]])
    several = Measured(
        rounds=[[1, 1, 1, 1]], startup=[1], processor=[[5, 2, 4, 5]], notes={"processes": True}
    )
    rows = compare({OURS: ours, "other": other, "several": several})
    assert rows["other"]["processor_ratio"] == spread([0.5])
    assert rows["several"]["processor_ratio"] is None


def test_the_same_quality_is_the_same_change_of_the_development_loss() -> None:
    ours = Measured([[9, 1]], [1], until_trained=[20.0, 30.0], memory=[5, 7], development=(3.0, 2.0))
    near, far = (replace(ours, development=(3.0, after)) for after in (2.009, 2.011))
    rows = compare({OURS: ours, "near": near, "far": far, "older": Measured([[9, 1]], [1])})
    assert rows[OURS]["development"] == {"before": 3.0, "after": 2.0, "reached": True}
    assert [rows[name]["development"]["reached"] for name in ("near", "far")] == [True, False]
    assert rows[OURS]["until_trained"]["median"] == 25.0
    assert rows[OURS]["memory"]["median"] == 6
    assert [rows["older"][key] for key in ("development", "until_trained", "memory")] == [None, None, None]


def test_memory_is_that_of_all_processes() -> None:
    code = "b = bytearray(100_000_000)\nimport time; time.sleep(5)"
    tree_of_two = (
        "import subprocess, sys, time\n"
        f"other = subprocess.Popen([sys.executable, '-c', {code!r}])\n{code.splitlines()[0]}\nother.wait()"
    )
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", tree_of_two]) as process, watched(process.pid) as tree:
        process.wait()
    assert 200e6 < tree.peak() < 300e6
    assert tree.peak(until=before) == 0


def test_what_an_engine_leaves_behind_is_ended() -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(4)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with watched(process.pid) as tree:
        assert process.stdout is not None
        left = int(process.stdout.readline())
        process.wait()
    assert psutil.pid_exists(left)
    tree.end(patience=0)
    psutil.wait_procs([one for one in tree.known if one.pid == left], timeout=5)
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_peers_run_no_more_often_than_is_asked_for(tmp_path: Path) -> None:
    write = (
        "import json, pathlib, sys, time; pathlib.Path(sys.argv[2], 'result.json').write_text(json.dumps("
        "dict(rounds=[0.1], processor=[0.1], losses=[1.0], ended=time.time(), evaluating=0.5)))"
    )
    engines = [
        Engine(OURS, (sys.executable, "-c", write)),
        Engine("peer", (sys.executable, "-c", write), repetitions=1),
    ]
    found = alternate(engines, tmp_path, 3, 1)
    assert [len(found[name].rounds) for name in (OURS, "peer")] == [3, 1]
    assert all(-0.5 < seconds < 30 for seconds in found[OURS].until_trained)
    rows = compare(found)
    assert [rows[name]["repetitions"] for name in (OURS, "peer")] == [3, 1]


def test_distance_is_relative_to_what_was_trained(tmp_path: Path) -> None:
    tensors = {"ours": [3.0, 0.0], "theirs": [2.0, 0.0], "start": [0.0, 0.0]}
    for name, values in tensors.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(values)}, tmp_path / name / "adapter_model.safetensors")
    assert distance(tmp_path / "ours", tmp_path / "theirs", tmp_path / "start") == pytest.approx(0.5)
    save_file({"v": torch.zeros(2)}, tmp_path / "ours" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="differ in names"):
        distance(tmp_path / "ours", tmp_path / "theirs", tmp_path / "start")


def test_an_engine_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    engines = [
        Engine("fails", ("sh", "-c", "echo no such engine; exit 3")),
        Engine("missing", ("sh",), problem="cannot be installed: ERROR"),
        Engine("slow", ("sh", "-c", "exec sleep 30")),
    ]
    found = alternate(engines, tmp_path, 2, 1, limit=1)
    assert found["fails"].problem == "no such engine"
    assert found["missing"].problem == "cannot be installed: ERROR"
    assert found["slow"].problem == "not done after 1 s"


def test_every_engine_gets_the_same_batches(tmp_path: Path) -> None:
    job = peers_job.job(tmp_path, rounds=2, steps=3, clients=2, batch_size=4)
    work = json.loads((job / "work.json").read_text())
    assert len(work["rounds"]) == 2
    for plan in work["rounds"]:
        assert [len(item["batches"]) for item in plan.values()] == [3, 3]
        seen = [i for item in plan.values() for batch in item["batches"] for i in batch]
        assert sorted(seen) == list(range(24))  # one pass over everybody's texts
    assert {len(example) for example in work["examples"]} == {64}
    assert work["rounds"][0] != work["rounds"][1]


def dolly(folder: Path) -> Path:
    """Rows of which each has more words than its tokens are cut to."""
    texts = [" ".join(f"word{(row * 7 + place) % 50}" for place in range(70)) for row in range(12)]
    lines = [json.dumps({"context": text, "response": text[::-1]}) + "\n" for text in texts]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_engines_are_compared_on_rows_that_nobody_trains_on(tmp_path: Path) -> None:
    rows = 3
    job = instruct.job(
        tmp_path / "job",
        "lora",
        dolly(tmp_path / "dolly"),
        clients=1,
        development=rows,
        base="builtin:lm-small",
    )
    work = json.loads((job / "work.json").read_text())
    assert len(work["examples"]) == instruct.BATCH
    assert [len(one) for one in work["development"]["examples"]] == [instruct.TOKENS] * rows
    assert not {tuple(one) for one in work["development"]["examples"]} & set(map(tuple, work["examples"]))

    measured = alternate(own_engines(), job, 1, 1)
    found = compare(measured)
    for row in found.values():
        assert row["development"]["reached"], found
        assert 0 < row["until_trained"]["median"] < row["startup"]["median"] + sum(row["rounds"][0])
        assert row["memory"]["median"] > 1e8
    # The loss before training: that of the base model alone, whose adapter adds nothing yet.
    model = transformers.AutoModelForCausalLM.from_pretrained(job / "model").eval()
    ids = torch.tensor(work["development"]["examples"])
    with torch.inference_mode():
        chances = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    targets = [chances[row, start - 1 :] for row, start in enumerate(work["development"]["labels"])]
    expected = -float(torch.cat(targets).mean())
    assert found[OURS]["development"]["before"] == pytest.approx(expected, rel=1e-4)
    assert found[OURS]["development"]["after"] < expected


@pytest.mark.slow
def test_ours_and_the_bare_loop_end_alike(tmp_path: Path) -> None:
    job = peers_job.job(tmp_path, rounds=2, steps=3, clients=2, batch_size=4)
    found = alternate(own_engines(), job, 1, 1)
    assert not any(one.problem for one in found.values()), found
    rows = compare(found)
    assert rows["bare loop"]["distance"] < 1e-4
    assert rows["bare loop"]["loss_difference"] < 1e-5
    assert len(rows[OURS]["rounds"][0]) == 2


def test_peers_may_share_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.environments.BUILD", tmp_path)
    (tmp_path / "nvflare").mkdir()
    wanted = PEERS / "nvflare" / "requirements.txt"
    (tmp_path / "nvflare" / "ready").write_text(wanted.read_text())
    with_trainer, plain = peer("nvflare_hf"), peer("nvflare")
    assert with_trainer.command[0] == plain.command[0] == str(tmp_path / "nvflare" / "bin" / "python")
    assert with_trainer.command[1].endswith("nvflare_hf/run.py")
    assert not with_trainer.problem


def test_phases_add_up_what_is_called() -> None:
    phases = Phases()
    assert phases.timed("forward", lambda x: x + 1)(2) == 3
    with phases.watching():
        x = torch.ones(3, requires_grad=True)
        x.sum().backward()
    assert phases.seconds["forward"] > 0
    assert phases.seconds["backward"] > 0
    assert phases.seconds["optimiser"] == 0
    assert torch.Tensor.backward.__name__ == "backward"


def test_small_forms_of_the_other_cases() -> None:
    found = aggregation.measure(clients=2, tensors=2, numbers=100, repetitions=2)
    assert found["updates_bytes"] == 2 * 2 * 100 * 4
    assert gpu.missing() is None or gpu.missing().startswith("skipped")
    assert (scaling.COUNTS[-1], scaling.SKEWED[-1]) == (10_000, 1_000_000)
    assert min(*secure_sums.one_round(4, 100), *secure_sums.one_round(4, 100, lost=True)) > 0


def test_the_case_on_a_gpu_runs_dry(tmp_path: Path) -> None:
    plan = [gpu.Measurement("tiny", None, "lora", 1), gpu.Measurement("tiny", None, "prefix memory", 4)]
    plan.append(gpu.Measurement("tiny", "none such", "lora", 4))
    small: dict[str, Any] = {"clients": 2, "steps": 1, "tokens": 16, "repetitions": 1}
    with pytest.raises(ValueError, match="quantization"):
        gpu.measure(tmp_path, plan=plan, device="cpu", **small)
    found = gpu.measure(tmp_path, plan=plan[:2], device="cpu", **small)
    for row in found["rows"].values():
        assert row["tokens_per_second"]["together"]["median"] > 0
        assert row["share_of_peak"] > 0
    late = gpu.measure(tmp_path, plan=plan[:2], device="cpu", seconds=-1, **small)
    assert late["left_out"] == [one.name for one in plan[:2]]
    assert {one.shape for one in gpu.planned()} == set(gpu.SHAPES) - {"tiny"}


def profile() -> dict[str, Any]:
    return {
        "seconds": 4.0, "rounds": 2, "gigaflop": 100.0, "peak_gigaflop_per_second": 50.0,
        "phases": {"forward": 0.5, "federated overhead": 0.5}, "kinds": {"matrix products": 1.0},
    }  # fmt: skip


def test_the_limit_is_that_of_the_matrix_products() -> None:
    rows = compare({OURS: Measured([[1, 1]], [1]), "bare loop": Measured([[4, 4]], [1])})
    assert least_ratio({"engines": rows, "profile": profile()}) == pytest.approx(100 / 50 / 2 / 4)


def test_the_page_is_made_of_results_alone(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    write_page(tmp_path, target)
    assert target.read_text().count("Not measured yet") >= 5
    machine = {
        "measured": "2026-01-01", "processor": "P", "cores": 2, "threads": 1, "python": "3",
        "load_at_start": 0.0, "packages": {"torch": "2", "transformers": "5", "peft": "0"},
    }  # fmt: skip
    measured = {
        OURS: Measured([[9, 1]], [1], notes={}), "bare loop": Measured([[9, 2]], [1], distance=1e-6),
        "peer": Measured([[9, 4]], [1], notes={"note": "a note"}), "gone": Measured(problem="a reason"),
    }  # fmt: skip
    case = {"machine": machine, "engines": compare(measured), "profile": profile()}
    (tmp_path / "a.json").write_text(json.dumps(case))
    (tmp_path / "b.json").write_text(json.dumps({"machine": machine, "skipped": "skipped: no data"}))
    (tmp_path / "c.json").write_text(
        json.dumps({"machine": machine, "methods": {"lora": {**case, "profile": None}}})
    )
    older = {name: {**row} for name, row in case["engines"].items()}
    for row in older.values():
        for key in ("development", "until_trained", "memory"):
            row.pop(key, None)
    known = {
        name: replace(one, until_trained=[12.0], memory=[3_000_000_000], development=(2.5, after))
        for (name, one), after in zip(list(measured.items())[:3], (2.4, 2.4, 2.45), strict=True)
    }
    methods = {"lora": {**case, "engines": compare(known)}, "prefix": {**case, "engines": older}}
    (tmp_path / "g.json").write_text(json.dumps({"machine": machine, "steps": 1, "methods": methods}))
    write_page(tmp_path, target)
    text = target.read_text()
    assert "Development loss: 2.5000 before training, 2.4000 after it." in text
    assert "| bare loop | 2.4000 | 12.0 s | 3000 MB |" in text
    assert "| peer | 2.4500 | not reached | 3000 MB |" in text
    assert "| bare loop | not measured | not measured | not measured |" in text
    assert "The profile could not be measured." in text
    assert "| bare loop | 2.00 s | 0.50 |  |" in text
    assert "did not run: a reason" in text
    assert "peer: a note." in text
    assert "skipped: no data" in text
