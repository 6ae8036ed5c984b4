"""The page of claims is what its script makes of the results, and its verdicts are what their figures say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scripts.summary import EVEN, SKEWED, Claim, Results, claims, main

from fedcustom.experiment.results import read_result, write_result

HERE = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["summary.py", str(HERE / "results"), str(tmp_path)])
    main()
    for name in ("summary.md", "quality-bytes.svg"):
        made, kept = (folder / name for folder in (tmp_path, HERE / "docs" / "results"))
        assert made.read_text() == kept.read_text(), (
            f"run: python scripts/summary.py results docs/results ({name})"
        )


def test_a_verdict_is_what_the_paired_differences_say(tmp_path: Path) -> None:
    """Made-up accuracies on one set; the others were not measured."""
    first = read_result(next((HERE / "results" / "prefix-memory").glob("trec--iid--memory--seed-0.json")))
    scores = {
        ("memory", EVEN): [0.90, 0.92, 0.91], ("memory", SKEWED): [0.88, 0.91, 0.90],
        ("lora", SKEWED): [0.885, 0.905, 0.90],
    }  # fmt: skip
    for (method, partition), there in scores.items():
        for seed, accuracy in enumerate(there):
            points = {"data": "trec", "partition": partition, "method": method}
            made = replace(
                first,
                points=points,
                seed=seed,
                digest=f"{method}{partition}{seed}",
                metrics={"accuracy": accuracy},
            )
            write_result(tmp_path / "all" / f"{method}--{partition}--{seed}.json", made)
    found = {
        claim.text.partition(":")[0] + claim.text.partition(":")[2][:5]: claim
        for claim in claims(Results(tmp_path, ["all"]))
    }

    skew = found["robust to label skew Diri"]
    differences = 100 * (np.array(scores["memory", SKEWED]) - scores["memory", EVEN])
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / np.sqrt(3)
    assert skew.figures["trec"] == (f"{differences.mean():+.1f} ± {half:.1f} (3)", True)
    assert skew.verdict == "open: measured on 1 of 3"
    assert found["competitive even"].verdict == "not measured"

    differences = 100 * (np.array(scores["memory", SKEWED]) - scores["lora", SKEWED])
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / np.sqrt(3)
    assert differences.mean() - half < -1
    assert found["competitive Diri"].figures["trec"][1] is False
    both = {"trec": ("", True), "sst2": ("", False), "banking77": ("", True)}
    assert Claim("", "", both).verdict == "**not reached** (2 of 3)"
