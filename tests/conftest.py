"""Tiny models, a tiny data set, small recipes and the command line, for every test."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FEDCUSTOM_EXPORT_CHECK", "off")  # seconds a run; tests/methods/tuning have it on
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more; also for child processes

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("no deadline", deadline=None)  # two busy cores are no fault of the code
hypothesis.settings.load_profile("no deadline")

pytest.register_assert_rewrite("helpers")

LONGEST_ID = 80
"""Characters of a parameter in a test's name."""


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """A short name for a long parameter: names travel between the workers, once for every test and worker."""
    return f"{argname}-of-{len(val)}" if isinstance(val, str | bytes) and len(val) > LONGEST_ID else None


from helpers.commands import Result
from helpers.rows import make_rows, write_jsonl
from helpers.tiny_models import sentence_files, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "train.jsonl", make_rows(160, 0))
    write_jsonl(folder / "development.jsonl", make_rows(24, 1))
    write_jsonl(folder / "test.jsonl", make_rows(40, 2))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models: bert, llama (grouped-query attention), gpt2 (Conv1D layers), bart."""
    folders = {}
    tokenizer = tiny_tokenizer()
    for kind in ("bert", "llama", "gpt2", "bart"):
        folder = tmp_path_factory.mktemp("models") / kind
        torch.manual_seed(11)
        tiny_model(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="session")
def sentence(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny BERT as a sentence-transformers folder: mean pooling, length 1."""
    folder = shutil.copytree(tiny["bert"], tmp_path_factory.mktemp("models") / "sentence")
    return str(sentence_files(folder, {"pooling_mode_mean_tokens": True}, normalize=True))


@pytest.fixture
def small(tiny: dict[str, str], data_folder: Path) -> dict[str, Any]:
    """A recipe that runs in about a second: tiny encoder, four natural clients, two rounds."""
    return {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(data_folder), "test": "test", "max_length": 24},
        "clients": {"partition": "natural", "column": "site"},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8},
        "rounds": {"count": 2},
        "evaluation": {"batch_size": 32},
    }


@pytest.fixture
def generation(tiny: dict[str, str], data_folder: Path) -> dict[str, Any]:
    """The same for a tiny decoder that generates."""
    return {
        "model": {"base": tiny["llama"]},
        "data": {
            "source": str(data_folder), "task": "generation", "test": "test", "development": "development",
            "prompt": "{source} :", "target": " {target}", "references": "references",
            "max_length": 24, "max_target_length": 16,
        },
        "clients": {"partition": "iid", "count": 3},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8},
        "rounds": {"count": 2, "clients_per_round": 2},
        "evaluation": {"max_new_tokens": 8},
    }  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command line in this process."""
    import fedcustom.cli.app as cli

    def call(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedcustom", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        said = capsys.readouterr()
        return Result(int(exit_.value.code or 0), said.out, said.err)

    return call
