"""A ``trl.SFTTrainer`` in federated rounds; skipped where trl is absent, which no extra installs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import fedcustom
from fedcustom.core.errors import RunError
from helpers.rows import make_rows
from helpers.tiny_models import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl", reason="needs trl: pip install trl")


def test_sft_trainer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"text": row["text"]} for row in make_rows(30, 3)]
    clients = {"a": Dataset.from_list(rows[:12]), "b": Dataset.from_list(rows[12:20])}
    held_out = Dataset.from_list(rows[20:])
    torch.manual_seed(5)
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        max_length=32, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip

    def make(data: Dataset) -> trl.SFTTrainer:
        return trl.SFTTrainer(
            model, arguments, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer
        )

    result = fedcustom.federate(make, clients=clients, rounds=2, out=tmp_path / "run")
    losses = result.history["development.loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    with pytest.raises(RunError, match="give a function"):
        fedcustom.federate(make(clients["a"]), clients=clients, rounds=2, out=tmp_path / "refused")
