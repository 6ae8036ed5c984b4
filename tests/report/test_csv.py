"""The page's tables as CSV files, made by the page itself from a file, without a server."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from fedcustom.report import comparison, write_report
from helpers.browser import found_by, needs_chromium
from helpers.report import classified, write_run

PROBE = """<!doctype html><body><iframe id="page" src="report.html" width="1280" height="800"></iframe>
<script>
onload = () => setTimeout(() => {
  const page = document.getElementById("page").contentWindow;
  const texts = [], names = [];
  page.Blob = function (parts) { texts.push(parts.join("")); };
  page.URL.createObjectURL = () => "about:blank#";
  page.HTMLAnchorElement.prototype.click = function () { names.push(this.download); };
  const buttons = [...page.document.querySelectorAll("button.csv")];
  const labels = buttons.map((button) => button.getAttribute("aria-label"));
  for (const button of buttons) button.click();
  document.body.setAttribute("data-found", JSON.stringify({texts, names, labels,
    tables: page.document.querySelectorAll("table").length}));
}, 1500);
</script></body>"""


@pytest.mark.slow
@needs_chromium
def test_every_table_can_be_had_as_csv(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for method in ("prefix", "lora"):
        for seed in range(3):
            write_run(runs / f"{method}-{seed}", method=method, seed=seed, clients=["=1+1", 'a "b", c', "-2"],
                      predictions=classified(seed), rounds=4)  # fmt: skip
    write_report([runs], tmp_path / "report.html")
    found = found_by(PROBE, tmp_path)
    assert len(found["texts"]) == len(found["labels"]) == found["tables"] > 4
    assert len(set(found["labels"])) == len(found["labels"])
    tables = [list(csv.reader(io.StringIO(text.removeprefix("\ufeff")))) for text in found["texts"]]
    assert all(len({len(row) for row in table}) == 1 for table in tables)

    head, *rows = tables[found["names"].index("results.csv")]
    frame = comparison([runs])
    assert len(head) == len(set(head))
    for row in rows[: len(frame)]:
        values = dict(zip(head, row, strict=True))
        expected = frame[frame["method"] == values["Method"].split()[-1].lower()].iloc[0]
        for name in ("accuracy", "accuracy_interval", "worst_client_loss", "bytes_up_total", "seconds"):
            assert float(values[name]) == expected[name], name

    clients = next(table for table in tables if table[0][0] == "Client")
    assert [row[0] for row in clients[1:]] == ["'=1+1", 'a "b", c', "-2"]  # no formula, and a number as it is
