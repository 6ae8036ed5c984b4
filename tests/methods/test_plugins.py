"""Other packages' methods, aggregation rules and partitions, offered through entry points."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from helpers.rows import make_rows, write_jsonl

METHOD = '''
from typing import ClassVar, Literal
from fedcustom.methods.registry import register
from fedcustom.methods.settings import TuningSettings
from fedcustom.models.size_class import Rates

@register("{package}_method:Last", title="last bias", colours=("#123456", "#654321"))
class LastSettings(TuningSettings):
    """The last layer's biases alone."""

    rates: ClassVar[Rates] = Rates(encoder=0.01, decoder=0.01, large=0.01)
    name: Literal["last_bias"] = "last_bias"
'''

TECHNIQUE = """
from fedcustom.methods.tuning.whole_model import partly_trained

class Last:
    def __init__(self, settings):
        self.settings = settings

    def attach(self, base, seed):
        names = [name for name, _ in base.model.named_parameters() if ".layer." in name and "bias" in name]
        return partly_trained(base, seed, names[-1:])
"""

RULE = """
def largest(changes, settings):
    heaviest = max(changes, key=lambda change: (change.weight, change.client))
    return dict(heaviest.tensors)

def smaller(changes, settings):
    return {}
"""

PARTITION = """
def dealt(labels, settings, seed):
    return [range(number, len(labels), settings.count) for number in range(settings.count)]

def lost(labels, settings, seed):
    return [[] for _ in range(settings.count)]
"""


def install(site: Path, package: str, points: str, **modules: str) -> None:
    """A package as an installer leaves it, in a folder for ``PYTHONPATH``."""
    site.mkdir(exist_ok=True)
    for name, content in modules.items():
        (site / f"{package}_{name}.py").write_text(content.replace("{package}", package))
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with the packages of a folder."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fedcustom", *arguments], capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "400"},
    )  # fmt: skip


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> Path:
    rows = write_jsonl(tmp_path / "data.jsonl", make_rows(60, 1))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"[model]\nbase = '{tiny['bert']}'\n[data]\nmax_length = 24\nsource = '{rows}'\n[rounds]\ncount = 1\n"
        "[clients]\npartition = 'dealt'\ncount = 3\n[aggregation]\nrule = 'largest'\n"
        "[method]\nname = 'last_bias'\n"
    )
    return path


def test_a_run_with_another_packages_method_rule_and_partition(tmp_path: Path, recipe: Path) -> None:
    site = tmp_path / "site"
    install(
        site, "acme",
        "[fedcustom.methods]\nlast_bias = acme_settings:LastSettings\n"
        "[fedcustom.aggregation]\nlargest = acme_rule:largest\n"
        "[fedcustom.partitions]\ndealt = acme_partition:dealt\n",
        settings=METHOD, method=TECHNIQUE, rule=RULE, partition=PARTITION,
    )  # fmt: skip
    done = command(site, "run", str(recipe), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "last bias" in done.stdout
    assert "--method-last_bias: #123456;" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_broken_plug_in_is_one_line_and_the_others_stay(tmp_path: Path, recipe: Path) -> None:
    site = tmp_path / "site"
    install(
        site, "acme",
        "[fedcustom.methods]\nlast_bias = acme_settings:LastSettings\n"
        "[fedcustom.aggregation]\nlargest = acme_rule:largest\n"
        "[fedcustom.partitions]\ndealt = acme_partition:dealt\n",
        settings=METHOD, rule=RULE, partition=PARTITION,
    )  # fmt: skip
    install(
        site, "broken",
        "[fedcustom.methods]\nnothing = broken_settings:Nothing\nlora = broken_settings:Nothing\n"
        "[fedcustom.aggregation]\nabsent = broken_rule:absent\n",
        settings="raise RuntimeError('no luck\\ntoday')",
    )  # fmt: skip
    checked = command(site, "recipe", str(recipe))
    assert checked.returncode == 0, checked.stderr
    assert 'name = "last_bias"' in checked.stdout
    assert sorted(checked.stderr.splitlines()) == [
        "plug-in 'lora' (fedcustom.methods) of package 'broken' is left out: the name belongs to fedcustom",
        "plug-in 'nothing' (fedcustom.methods) of package 'broken' is left out: cannot be loaded: "
        "RuntimeError: no luck today",
    ]
    unknown = command(site, "recipe", str(recipe), "--set", "method.name=last_bia")
    assert "did you mean 'last_bias'" in unknown.stderr


def test_the_experiments_plug_in_trains_pairs_and_feed_forward_slots(tmp_path: Path, recipe: Path) -> None:
    plugin = Path(__file__).parents[2] / "experiments" / "plugins" / "kv_feed_forward"
    project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
    points = "".join(f"{name} = {at}\n" for name, at in project["entry-points"]["fedcustom.methods"].items())
    site, run = tmp_path / "site", tmp_path / "run"
    install(site, "acme", f"[fedcustom.methods]\n{points}")
    shutil.copytree(plugin / "kv_feed_forward", site / "kv_feed_forward")
    changes = ("clients.partition=iid", "aggregation.rule=mean", "method.name=kv_feed_forward")
    sizes = ("method.length=2", "method.feed_forward_slots=3")
    sets = [part for change in (*changes, *sizes) for part in ("--set", change)]
    done = command(site, "run", str(recipe), *sets, "--out", str(run))
    assert done.returncode == 0, done.stderr
    config = AutoConfig.from_pretrained(tomllib.loads(recipe.read_text())["model"]["base"])
    slots = load_file(run / "model" / "feed_forward_slots.safetensors")
    size, width = config.hidden_size, 3
    assert sum(tensor.numel() for tensor in slots.values()) == config.num_hidden_layers * (
        width * size + width + size * width
    )
    assert all(tensor.any() for name, tensor in slots.items() if name.endswith("weight"))  # U begins at zero
    text = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    said = command(site, "predict", str(run), text["text"])
    assert said.returncode == 0, said.stderr
    assert f"{text['probability']:.2f}" in said.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "aggregation.rule=absent",
            "plug-in 'absent' (fedcustom.aggregation) of package 'acme' cannot be loaded: "
            "ModuleNotFoundError: No module named 'acme_absent'",
        ),
        ("aggregation.rule=smaller", "its change must have the names and shapes of the clients' changes"),
        ("clients.partition=lost", "must give each of 60 examples to one of 3 clients"),
        ("method.name=last_bias", "acme_method:Last of package 'acme' cannot be imported"),
    ],
)
def test_a_plug_in_that_does_not_do_what_it_must_is_named(
    tmp_path: Path, recipe: Path, change: str, message: str
) -> None:
    site = tmp_path / "site"
    install(
        site, "acme",
        "[fedcustom.methods]\nlast_bias = acme_settings:LastSettings\n"
        "[fedcustom.aggregation]\nsmaller = acme_rule:smaller\nabsent = acme_absent:rule\n"
        "[fedcustom.partitions]\nlost = acme_partition:lost\n",
        settings=METHOD, rule=RULE, partition=PARTITION,
    )  # fmt: skip
    sound = ["method.name=bitfit", "aggregation.rule=mean", "clients.partition=iid", change]
    arguments = [part for each in sound for part in ("--set", each)]
    done = command(site, "run", str(recipe), "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
