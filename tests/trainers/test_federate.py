"""``fedcustom.federate``: a user's Trainer in federated rounds, against FedAvg written out by hand."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

import fedcustom
from fedcustom.core.errors import FedcustomError, RunError
from fedcustom.core.seeds import name_seed
from fedcustom.report import write_report
from helpers.rows import make_rows
from helpers.tiny_models import tiny_model, tiny_tokenizer

SIZES = {"north": 12, "south": 7, "west": 5}


@pytest.fixture(autouse=True, scope="module")
def _few_objects() -> Iterator[None]:
    """``Trainer.train`` collects garbage each time, which takes half a second with all libraries loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class WeightedLoss(Trainer):
    """A Trainer with a loss of its own: half of the usual one."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss * 0.5
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator of our own: padded to 16 tokens."""
    ids = torch.zeros(len(rows), 16, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"][:16])
        ids[place, : len(tokens)] = tokens
    labels = ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@cache
def datasets() -> tuple[dict[str, Dataset], Dataset]:
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in make_rows(40, 3)]
    ends = np.cumsum(list(SIZES.values()))
    clients = {
        name: Dataset.from_list(rows[end - SIZES[name] : end])
        for name, end in zip(SIZES, ends.tolist(), strict=True)
    }
    return clients, Dataset.from_list(rows[-8:])


def model(*, adapter: bool) -> Any:
    torch.manual_seed(5)
    base = tiny_model("llama")
    if not adapter:
        return base
    torch.manual_seed(6)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def make_trainer(
    folder: Path, *, adapter: bool = True, kind: type[Trainer] = WeightedLoss, **more: Any
) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="linear", disable_tqdm=True, use_cpu=True, report_to="none", logging_strategy="no",
    )  # fmt: skip
    return kind(model(adapter=adapter), arguments, data_collator=collate, eval_dataset=datasets()[1])


def by_hand(trainer: Any, rounds: int, seed: int, *, uniform: bool = False) -> dict[str, torch.Tensor]:
    """FedAvg (McMahan et al. 2017, algorithm 1): the mean of the clients' weights, not of their changes."""
    clients, _ = datasets()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    state = {name: p.detach().double().clone() for name, p in trained.items()}
    for number in range(1, rounds + 1):
        total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        weights = {name: 1 if uniform else len(data) for name, data in clients.items()}
        for name, data in clients.items():
            with torch.no_grad():
                for key, parameter in trained.items():
                    parameter.copy_(state[key])
            set_seed(int(np.random.SeedSequence([seed, 21, number, name_seed(name)]).generate_state(1)[0]))
            trainer.train_dataset = data
            trainer.optimizer = trainer.lr_scheduler = None
            trainer.train()
            for key, parameter in trained.items():
                total[key] += weights[name] / sum(weights.values()) * parameter.detach().double()
        state = total
    return state


@pytest.mark.parametrize(("adapter", "weighting"), [(True, "examples"), (False, "uniform")])
def test_equals_fedavg_by_hand(tmp_path: Path, adapter: bool, weighting: Any) -> None:
    """Of an adapter and of a whole model, with a loss and a collator of the user's. (In float64: Adam makes
    of rounding in a gradient near zero a whole step.)
    """
    clients, _ = datasets()
    trainer, hand = (make_trainer(tmp_path / name, adapter=adapter) for name in ("ours", "hand"))
    trainer.model.double(), hand.model.double()
    result = fedcustom.federate(
        trainer, clients=clients, rounds=2, weighting=weighting, seed=4, select="last", out=tmp_path / "run"
    )
    expected = by_hand(hand, 2, 4, uniform=weighting == "uniform")
    found = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-9)
    before = dict(model(adapter=adapter).named_parameters())
    assert any(not torch.allclose(before[name].double(), tensor, atol=1e-3) for name, tensor in found.items())
    assert result.summary["trainable_parameters"] == sum(t.numel() for t in expected.values())
    scored = trainer.evaluate()
    assert result.summary["metrics"]["loss"] == pytest.approx(scored["eval_loss"], abs=1e-6)
    assert trainer.args.save_strategy != "no"  # the arguments are as they were
    assert not list((tmp_path / "ours").rglob("checkpoint*"))


def test_run_directory_and_model(tmp_path: Path) -> None:
    """Rows as in every run; the adapter loads with peft and scores the same."""
    clients, held_out = datasets()
    trainer, rows = make_trainer(tmp_path, kind=Trainer), []

    class Follow(fedcustom.Callback):
        def on_round_end(self, row: dict[str, Any]) -> None:
            rows.append(row)

    result = fedcustom.federate(
        trainer, clients=clients, rounds=2, clients_per_round=2, out=tmp_path / "run", callbacks=[Follow()]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [len(line["answered"]) for line in lines[1:]] == [2, 2]
    assert set(lines[1]["steps"].values()) == {3}
    assert list(result.history["cohort"]) == [0, 2, 2]
    assert set(result.client_history["client"]) <= set(SIZES)
    assert result.summary["best_round"] == min(lines[1:], key=lambda row: row["development"]["loss"])["round"]
    torch.manual_seed(5)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "run" / "model")
    other = Trainer(again, trainer.args, data_collator=collate, eval_dataset=held_out)
    assert other.evaluate()["eval_loss"] == pytest.approx(result.summary["metrics"]["loss"], abs=1e-6)
    assert not list((tmp_path / "run").rglob("*.bin"))
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{result.summary['metrics']['loss']:.3f}" in page


def test_resumes_to_the_same_numbers(tmp_path: Path) -> None:
    """Stopped in round 2 and resumed with a new Trainer: the same tensors and scores, bit for bit."""
    clients, _ = datasets()

    class Stop(fedcustom.Callback):
        def on_round_start(self, number: int) -> None:
            if number == 3:
                raise KeyboardInterrupt

    whole, stopped, again = (make_trainer(tmp_path) for _ in range(3))
    options: Any = {"clients": clients, "rounds": 3, "aggregation": {"server_optimizer": "fedavgm"}}
    expected = fedcustom.federate(whole, **options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedcustom.federate(stopped, **options, out=tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(RunError, match="resume=True"):
        fedcustom.federate(again, **options, out=tmp_path / "run")
    with pytest.raises(RunError, match="aggregation differ"):
        fedcustom.federate(again, clients=clients, rounds=3, out=tmp_path / "run", resume=True)
    found = fedcustom.federate(again, **options, out=tmp_path / "run", resume=True)
    assert found.summary["metrics"] == expected.summary["metrics"]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    once_more = make_trainer(tmp_path)
    finished = fedcustom.federate(once_more, **options, out=tmp_path / "run")
    assert finished.summary == found.summary
    for a, b in zip(once_more.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_robust_rule_withstands_a_client(tmp_path: Path) -> None:
    """The median of three changes, computed from single runs of the Trainer."""
    clients, _ = datasets()
    trainer = make_trainer(tmp_path)
    fedcustom.federate(trainer, clients=clients, rounds=1, aggregation="median", out=tmp_path / "run")
    start = {n: p.detach() for n, p in model(adapter=True).named_parameters() if p.requires_grad}
    states = []
    for name, data in clients.items():
        alone = make_trainer(tmp_path)
        set_seed(int(np.random.SeedSequence([0, 21, 1, name_seed(name)]).generate_state(1)[0]))
        alone.train_dataset = data
        alone.train()
        states.append({n: p.detach() for n, p in alone.model.named_parameters() if p.requires_grad})
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            changes = torch.stack([state[name] - start[name] for state in states])
            expected = start[name] + changes.median(dim=0).values
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


def test_a_failing_client_is_left_out(tmp_path: Path) -> None:
    """The other clients go on; where all fail, the reason is in the message."""
    clients, _ = datasets()
    broken = Dataset.from_list([{"input_ids": None, "labels": 1}])
    trainer = make_trainer(tmp_path)
    result = fedcustom.federate(
        trainer, clients={**clients, "broken": broken}, rounds=1, out=tmp_path / "run"
    )
    assert set(result.client_history.query("answered")["client"]) == set(SIZES)
    assert "broken left out" in (tmp_path / "run" / "warnings.log").read_text()
    with pytest.raises(RunError, match="0 of 1 clients answered"):
        fedcustom.federate(make_trainer(tmp_path), clients={"broken": broken}, rounds=1, out=tmp_path / "all")


def test_a_function_that_makes_trainers(tmp_path: Path) -> None:
    """The same result as with one Trainer, and models that differ are refused."""
    clients, held_out = datasets()
    one = make_trainer(tmp_path)
    fedcustom.federate(one, clients=clients, rounds=1, out=tmp_path / "one")
    shared, arguments = model(adapter=True), make_trainer(tmp_path).args

    def make(data: Dataset) -> Trainer:
        return WeightedLoss(shared, arguments, collate, train_dataset=data, eval_dataset=held_out)

    fedcustom.federate(make, clients=clients, rounds=1, out=tmp_path / "made")
    for a, b in zip(one.model.parameters(), shared.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RunError, match="another model for each client"):
        fedcustom.federate(lambda data: make_trainer(tmp_path), clients=clients, out=tmp_path / "refused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": {}}, "clients: give a dict"),
        ({"clients": {"a": []}}, "a: has no rows"),
        ({"clients_per_round": 9}, "clients_per_round = 9: there are 3 clients"),
        ({"aggregation": "medain"}, "did you mean 'median'"),
        ({"aggregation": "fltrust"}, "the server has no examples"),
        ({"aggregation": {"correction": "feddyn"}}, "use 'none'"),
        ({"rounds": 0}, "rounds.count"),
        ({"weighting": "rows"}, "aggregation.weighting"),
    ],
)
def test_settings_are_refused_in_one_line(tmp_path: Path, options: Any, message: str) -> None:
    given = {"clients": datasets()[0], "out": tmp_path / "run", **options}
    with pytest.raises(FedcustomError, match=message) as caught:
        fedcustom.federate(make_trainer(tmp_path), **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_trainers_are_refused_in_one_line(tmp_path: Path) -> None:
    clients, held_out = datasets()

    def refused(trainer: Any, message: str) -> None:
        with pytest.raises(RunError, match=message):
            fedcustom.federate(trainer, clients=clients, out=tmp_path / "run")

    refused("a name", "trainer is str")
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = None
    refused(trainer, "has no eval_dataset")
    trainer = make_trainer(tmp_path)
    trainer.create_optimizer()
    refused(trainer, "has an optimizer")
    trainer = Trainer(model_init=lambda: model(adapter=False), args=trainer.args, eval_dataset=held_out)
    refused(trainer, "model_init makes the model anew")
    trainer = make_trainer(tmp_path)
    trainer.model.requires_grad_(False)
    refused(trainer, "no parameter of its model is trained")
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"first": held_out}
    refused(trainer, "no finite eval_loss")
