"""An export that does not give the trained outputs is refused, and leaves nothing that looks done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedcustom
from fedcustom.core.errors import ExportError, RunError
from fedcustom.data.examples import Example
from fedcustom.federated.callbacks import Callback
from fedcustom.methods.tuning import export_check, peft_support
from fedcustom.methods.tuning.export_check import Reference, ReferenceRow, check_export, some, wanted
from fedcustom.methods.tuning.loading_page import INPUTS, loading_code
from helpers.lacking import lacking_checkpoint


@pytest.fixture
def recipe(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A quick run on a checkpoint without a pooling layer."""
    path, _, _ = lacking_checkpoint("bert", tmp_path / "base")
    quick = {"rounds": {"count": 1}, "evaluation": {"untuned": False}, "method": {"name": "lora"}}
    return {**small, **quick, "model": {"base": path}}


class Notes(Callback):
    """What a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    def on_information(self, text: str) -> None:
        self.texts.append(text)


def switch(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(export_check.SWITCH, value)


def test_a_run_with_a_wrong_export_is_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        switch(patched, "on")
        patched.setattr(peft_support, "add_initialised_weights", lambda *_: None)
        with pytest.raises(ExportError) as error:
            fedcustom.run(recipe, out=tmp_path / "run")
    words = str(error.value)
    assert "the export is refused" in words
    assert "gives other outputs than the trained model" in words
    assert "--no-check" in words
    assert "\n" not in words
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    notes = Notes()
    run = fedcustom.run(recipe, out=tmp_path / "run", resume=True, callbacks=[notes])
    assert (run.directory / "model" / "README.md").exists()
    assert any("2 weights that the checkpoint lacks" in text for text in notes.texts)
    assert any("not compared" in text and "switched off" in text for text in notes.texts)


@pytest.mark.slow
def test_the_export_command_refuses_what_is_not_the_trained_model(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    run = fedcustom.run(recipe, out=tmp_path / "run")
    switch(monkeypatch, "on")
    assert command("export", run.directory, "--to", tmp_path / "sound").code == 0
    file = run.directory / "model" / "adapter_model.safetensors"
    stored = load_file(file)
    for name in [name for name in stored if "pooler" in name]:
        del stored[name]
    save_file(stored, file, {"format": "pt"})
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new", tmp_path / "empty"):
        result = command("export", run.directory, "--to", target)
        assert result.code == 2
        assert "the export is refused" in result.error
        assert result.error.count("error:") == 1
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    result = command("export", run.directory, "--to", tmp_path / "empty", "--no-check")
    assert result.code == 0
    assert "not compared" in result.error


def test_a_base_model_that_changed_since_is_noticed(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fedcustom.run(recipe, out=tmp_path / "run")
    switch(monkeypatch, "on")
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    torch.manual_seed(0)
    for name in [name for name in stored if name.startswith("bert.encoder") and name.endswith("weight")]:
        stored[name] = torch.randn(stored[name].shape)
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"has .*base changed since\?"):
        run.export(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_export_into_the_models_own_folder_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = fedcustom.run(recipe, out=tmp_path / "run")
    with pytest.raises(RunError, match="own model folder"):
        run.export(run.directory / "model" / "copy")
    assert not (run.directory / "model" / "copy").exists()


def reference_of(output: list[float], tokens: list[int]) -> Reference:
    row = ReferenceRow("a text", {"input_ids": [1]}, tokens, torch.tensor(output))
    return Reference((row,), 1e-3, "a base", 4)


def written(folder: Path, logits: str, tokens: str = "[7, 8]") -> Path:
    """A folder whose page makes a model of these outputs."""
    code = (
        "import sys, torch\nassert sys.modules['fedcustom'] is None\n"
        "class Said(dict):\n    logits = property(lambda self: self['logits'])\n"
        f"model = lambda **given: Said(logits=torch.tensor([{logits}]))\n"
        f"tokenizer = lambda text: {{'input_ids': {tokens}}}\n"
    )
    (folder / "README.md").write_text(f"# A page\n\n```python\n{code}{INPUTS}print(model)\n```\n")
    return folder


@pytest.mark.parametrize(
    ("logits", "tokens", "words"),
    [
        ("[0.5, 2.0]", "[7, 8]", ""),
        ("[0.5, 2.0019]", "[7, 8]", ""),  # 1e-3 of the largest
        ("[0.5, 2.0021]", "[7, 8]", "differ by 0.0021, 0.002 is allowed"),
        ("[0.5, float('nan')]", "[7, 8]", "differ by nan"),
        ("[0.5, 2.0, 1.0]", "[7, 8]", "has 3 outputs; the trained model gives 2"),
        ("[0.5, 2.0]", "[7, 9]", "reads row 1 ('a text') as other tokens"),
        ("[0.5, missing]", "[7, 8]", "NameError: name 'missing' is not defined"),
    ],
)
def test_what_is_compared(tmp_path: Path, logits: str, tokens: str, words: str) -> None:
    folder = written(tmp_path, logits, tokens)
    expected = reference_of([0.5, 2.0], [7, 8])
    if not words:
        assert check_export(folder, expected) == ""
        return
    with pytest.raises(ExportError) as error:
        check_export(folder, expected)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md"]


def test_too_little_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "free_memory", lambda device: 10**9)
    expected = reference_of([0.5], [7])
    large = Reference(expected.rows, 1e-3, "a base", 4 * 10**9)
    assert "that takes 6.6 GB, and 1.0 GB of memory are free" in check_export(tmp_path, large)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(export_check.SWITCH)
    assert wanted(True)
    assert not wanted(False)
    for value in ("off", "OFF", "0", "false"):
        switch(monkeypatch, value)
        assert not wanted(True)


def test_rows_of_our_own_where_there_are_none() -> None:
    assert len(some([])) == len(export_check.TEXTS)
    many = [Example(str(number), label=0) for number in range(9)]
    assert some(many) == many[: export_check.ROWS]


def test_a_page_without_code_is_not_loaded() -> None:
    assert loading_code("# No code") == ""
