"""The wheel and the source distribution: what is in them, and that the wheel runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
    "MANIFEST.in",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package build")


def sources() -> set[str]:
    """The package's files in this tree."""
    files = (path for path in (ROOT / "src" / "fedcustom").rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT / "src")) for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution, built from a copy of this tree without a network."""
    place = tmp_path_factory.mktemp("distribution")
    tree = place / "tree"
    shutil.copytree(ROOT / "src" / "fedcustom", tree / "src" / "fedcustom")
    (tree / "tests").mkdir()
    (tree / "tests" / "test_x.py").write_text("")
    for name in BESIDE:
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "out"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (source,) = (place / "out").glob("*.whl"), (place / "out").glob("*.tar.gz")
    return wheel, source


def test_the_version_stands_in_one_place() -> None:
    version = PROJECT["version"]
    found = [
        name
        for name in sources()
        if f'"{version}"' in (ROOT / "src" / name).read_text(errors="replace") and name.endswith(".py")
    ]
    assert found == []


def test_the_wheel_has_the_package_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        meta = f"fedcustom-{PROJECT['version']}.dist-info"
        assert f"Version: {PROJECT['version']}" in file.read(f"{meta}/METADATA").decode()
        assert b"fedcustom = fedcustom.cli.app:main" in file.read(f"{meta}/entry_points.txt")
    assert {name for name in names if not name.startswith(meta)} == sources()
    assert f"{meta}/licenses/LICENSE" in names
    for kind in (".css", ".js", ".html", "py.typed", "lm-small/model.safetensors"):
        assert any(name.endswith(kind) for name in names), kind


def test_the_source_distribution_has_what_builds_the_wheel(distributions: tuple[Path, Path]) -> None:
    _, source = distributions
    with tarfile.open(source) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    own = {f"src/{name}" for name in sources()}
    made = {"PKG-INFO", "setup.cfg"}
    assert own | set(BESIDE) | made == {name for name in names if ".egg-info/" not in name}


def test_the_wheel_runs_a_recipe(distributions: tuple[Path, Path], data_folder: Path, tmp_path: Path) -> None:
    """Installed into a folder of its own, beside the packages that are here."""
    wheel, _ = distributions
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*command, str(wheel)], check=True)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model.base = "builtin:lm-small"\n'
        f'data = {{source = "{data_folder}", test = "test", max_length = 16}}\n'
        'clients = {partition = "iid", count = 2}\nmethod = {name = "lora", rank = 2}\n'
        "training = {batch_size = 8, local_steps = 1, fit_head = false}\n"
        "rounds.count = 1\nevaluation.untuned = false\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import fedcustom; print(fedcustom.__file__)"],
        env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert where.stdout.strip() == str(site / "fedcustom" / "__init__.py")
    done = subprocess.run(
        [sys.executable, "-m", "fedcustom", "run", str(recipe), "--out", "run", "--no-check"],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
