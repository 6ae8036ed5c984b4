"""Weights in the precision in which they are stored: the same numbers, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from fedcustom.data.examples import LearningTask
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings
from fedcustom.models.stored_weights import stored_half
from helpers.quantised import wide_model

TASK = LearningTask("generation")
IDS = torch.arange(3, 12)[None]


def loaded(folder: str, dtype: str) -> Base:
    return load_base(ModelSettings(base=folder, dtype=dtype), TASK, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_numbers_are_those_of_a_load_in_float32(
    tmp_path: Path, kind: torch.dtype, shards: dict[str, str]
) -> None:
    folder = wide_model(tmp_path / "model", "llama", dtype=kind, **shards)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == bool(shards)
    assert stored_half(folder, None) == kind
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = dict(plain.named_parameters())
    float32, half = loaded(folder, "float32"), loaded(folder, "bfloat16")
    for name, parameter in float32.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name])
    for name, parameter in half.model.named_parameters():
        assert parameter.dtype == (kind if parameter.dim() > 1 else torch.float32)
        assert torch.equal(parameter.float(), expected[name])
    with torch.no_grad():
        logits = plain(input_ids=IDS).logits
        assert torch.equal(float32.model(input_ids=IDS).logits, logits)
        # Outside of autocast matrices are used in float32, and stay as they are stored.
        assert torch.equal(half.model(input_ids=IDS).logits, logits)
    assert half.model.get_input_embeddings().weight.dtype == kind
    assert half.output is not None
    assert half.model.config.dtype == torch.float32


def test_a_checkpoint_in_float32_is_loaded_as_such(tmp_path: Path) -> None:
    folder = wide_model(tmp_path / "model", "llama")
    assert stored_half(folder, None) is None
    assert {p.dtype for p in loaded(folder, "bfloat16").model.parameters()} == {torch.float32}


def test_a_checkpoint_that_lacks_weights_is_loaded_in_float32(tmp_path: Path) -> None:
    """Weights that are drawn are drawn in float32."""
    folder = wide_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    found = loaded(folder, "bfloat16")
    assert found.loading.initialised == ("model.layers.1.mlp.up_proj.weight",)
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}


MEASURE = """
import json, sys, torch, transformers
from fedcustom.core import environment
from fedcustom.data.examples import LearningTask
from fedcustom.models.load import load_base
from fedcustom.models.settings import ModelSettings
load_base(ModelSettings(base="builtin:lm"), LearningTask("generation"), 0)
environment.restart_peak_memory()
before = environment.held_memory(torch.device("cpu"))
load_base(ModelSettings(base=sys.argv[1], dtype=sys.argv[2]), LearningTask("generation"), 0)
print(json.dumps(environment.peak_memory() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark")
def test_several_shards_are_not_held_twice(tmp_path: Path) -> None:
    """A model of 0.2 GB: at most 1.3 times its size in bfloat16, and in float32 that of float32."""
    configuration = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8, vocab_size=2000,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.bfloat16)
    size = 2 * model.num_parameters()
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    wide_model(tmp_path / "tokenizer", "llama")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    # A fixed threshold lets glibc give every freed block of a megabyte back at once. By default it keeps a
    # chance number of the matrices that were widened for the trial pass, up to a third of this model's size.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    for dtype, most in (("bfloat16", 1.3), ("float32", 2.5)):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "model"), dtype], capture_output=True, text=True,
            check=True, env=environment,
        )  # fmt: skip
        assert json.loads(done.stdout.splitlines()[-1]) < most * size, dtype
