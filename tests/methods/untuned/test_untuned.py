"""The untuned model, zero-shot and few-shot: prompts by hand, scores by plain transformers loops."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fedcustom
from fedcustom.core.errors import FedcustomError, RecipeError, RunError, UpdateError
from fedcustom.data.build import build_data
from fedcustom.data.examples import Example
from fedcustom.federated.build import make_method, pooled
from fedcustom.methods import Client, State
from fedcustom.methods.untuned.messages import ShotsTask, ShotsUpdate
from fedcustom.models.load import load_base
from fedcustom.recipe.recipe import load_recipe
from helpers.conversations import chat_llama, chat_recipe, conversations
from helpers.rows import make_rows, write_jsonl


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder of 256 positions whose tokenizer begins texts with <s>, with a chat template."""
    return chat_llama(tmp_path_factory.mktemp("chat") / "llama", padded_by_end=False)


def untuned(recipe: dict[str, Any], shots: int = 0, **changes: Any) -> dict[str, Any]:
    rest = {key: value for key, value in recipe.items() if key not in ("training", "rounds")}
    return {**rest, "baseline": "centralised", "method": {"name": "untuned", "shots": shots}, **changes}


def built(recipe: dict[str, Any]) -> tuple[Any, Any]:
    """The method of a recipe, and its data."""
    checked = load_recipe(recipe)
    data = build_data(checked.data, checked.clients, checked.seed, checked.public)
    base = load_base(checked.model, data.task, 0, head=False)
    return make_method(checked, base, data), data


def drawn(data: Any, shots: int, seed: int = 0) -> list[Example]:
    """The rows that are put into the context, by hand."""
    rows = [example for client in data.clients.values() for example in client.train]
    order = np.random.default_rng([seed, 25]).permutation(len(rows))
    return [rows[i] for i in order[:shots]]


def state_of(method: Any, data: Any) -> State:
    """The state after the round."""
    (one,) = pooled(data).values()
    task = ShotsTask(round_number=1)
    update = method.execute(task, Client(one.name, one))
    method.check(task, update)
    return State({}, {}, {"shots": update.shots})


def plain_loss(path: str, rows: list[tuple[str, str]]) -> float:
    """Nats a target token of a decoder, row by row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    total = count = 0.0
    for prompt, target in rows:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            odds = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
        total -= sum(float(odds[len(before) - 1 + i, token]) for i, token in enumerate(after))
        count += len(after)
    return total / count


# --- zero-shot ---


def test_zero_shot_is_a_plain_loop(generation: dict[str, Any], tiny: dict[str, str], tmp_path: Path) -> None:
    run = fedcustom.run(untuned(generation), out=tmp_path / "run")
    rows = [(f"{row['source']} :", f" {row['target']}") for row in make_rows(40, 2)]
    assert run.summary["metrics"]["loss"] == pytest.approx(plain_loss(tiny["llama"], rows), rel=1e-5)
    assert run.summary["metrics"] == run.summary["untuned"]
    assert {"rouge_l", "bleu", "loss"} <= run.summary["metrics"].keys()
    assert (run.summary["rounds"], run.summary["trainable_parameters"]) == (1, 0)


def test_zero_shot_is_what_other_runs_call_untuned(generation: dict[str, Any], tmp_path: Path) -> None:
    """And the same federated: the one round asks clients for nothing."""
    trained = fedcustom.run({**generation, "method": {"name": "lora"}}, out=tmp_path / "lora")
    quick = {**generation["evaluation"], "untuned": False}
    given = {**generation, "method": {"name": "untuned"}, "rounds": {"count": 9}, "evaluation": quick}
    run = fedcustom.run(given, out=tmp_path / "federated")
    assert run.summary["metrics"] == trained.summary["untuned"]
    assert (run.summary["rounds"], run.summary["untuned"]) == (1, {})


def test_an_encoder_decoder_and_a_conversation(
    generation: dict[str, Any], tiny: dict[str, str], llama: str, tmp_path: Path
) -> None:
    recipe = {**generation, "model": {"base": tiny["bart"]}}
    run = fedcustom.run(untuned(recipe), out=tmp_path / "bart")
    assert run.summary["metrics"] == run.summary["untuned"]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tiny["bart"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["bart"])
    total = count = 0.0
    for row in make_rows(40, 2):
        source = tokenizer(f"{row['source']} :", return_tensors="pt", return_token_type_ids=False)
        target = tokenizer(f" {row['target']}</s>", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        with torch.no_grad():
            total += float(model(**source, labels=target).loss) * target.shape[1]
        count += target.shape[1]
    assert run.summary["metrics"]["loss"] == pytest.approx(total / count, rel=1e-4)
    chat = fedcustom.run(untuned(chat_recipe(tmp_path, llama)), out=tmp_path / "chat")
    assert chat.summary["metrics"] == chat.summary["untuned"]
    assert chat.chat([{"role": "user", "content": "Why?"}]).text == chat.predict(["Why?"])[0]["text"]


# --- few-shot ---


@pytest.fixture
def texts(generation: dict[str, Any], llama: str) -> dict[str, Any]:
    """Generation on the decoder of 256 positions."""
    return {**generation, "model": {"base": llama}}


def test_the_prompt_is_that_by_hand(texts: dict[str, Any], tmp_path: Path) -> None:
    """Examples in the recipe's templates, a blank line between them; and the loss behind that prompt."""
    method, data = built(untuned(texts, shots=2, seed=3))
    state = state_of(method, data)
    shown = "".join(f"{e.text}{e.target}\n\n" for e in drawn(data, 2, seed=3))
    assert re.fullmatch(r"(kind \w+ thing \w+ : the \w+ is a \w+\n\n){2}", shown)
    prompts = method.prompts(state, data.test)
    tokenizer = transformers.AutoTokenizer.from_pretrained(texts["model"]["base"])
    assert prompts.sources == [tokenizer(shown + e.text)["input_ids"] for e in data.test]
    assert prompts.stop == ("\n\n",)
    run = fedcustom.run(untuned(texts, shots=2, seed=3), out=tmp_path / "run")
    rows = [(shown + e.text, e.target) for e in data.test]
    assert run.summary["metrics"]["loss"] == pytest.approx(plain_loss(texts["model"]["base"], rows), rel=1e-5)
    assert run.summary["metrics"]["loss"] != run.summary["untuned"]["loss"]
    prompt = json.loads((run.directory / "prompt.json").read_text())
    assert prompt["messages"] == [{"role": "user", "content": shown + "{input}"}]
    assert "cuts" not in run.summary


def test_in_a_conversation_examples_are_earlier_turns(llama: str, tmp_path: Path) -> None:
    recipe = untuned(chat_recipe(tmp_path, llama, system="Be brief."), shots=2)
    method, data = built(recipe)
    state = state_of(method, data)
    turns = []
    for example in drawn(data, 2):
        own = [m for m in example.messages if m.role != "system"]
        turns += [{"role": m.role, "content": m.content} for m in own]
        turns.append({"role": "assistant", "content": example.target})
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    expected = []
    for row in conversations():
        asked = [{"role": "system", "content": "Be brief."}, *turns, *row["messages"][:-1]]
        expected.append(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
    assert method.prompts(state, data.test).sources == expected
    assert method.prompts(state, data.test).stop == ()
    run = fedcustom.run(recipe, out=tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    total = count = 0.0
    for prompt, row in zip(expected, conversations(), strict=True):
        text = f"{row['messages'][-1]['content']}<|im_end|>"
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            odds = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(odds[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert run.summary["metrics"]["loss"] == pytest.approx(total / count, rel=1e-4)
    prompt_file = json.loads((run.directory / "prompt.json").read_text())
    last = {"role": "user", "content": "{input}"}
    assert prompt_file["messages"] == [{"role": "system", "content": "Be brief."}, *turns, last]


def test_what_does_not_fit_is_left_out_and_counted(
    generation: dict[str, Any], tiny: dict[str, str], tmp_path: Path
) -> None:
    """The longest first: 64 positions, of which the answer takes 16."""
    method, data = built(untuned(generation, shots=6))
    state = state_of(method, data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["llama"])
    shots = [f"{e.text}{e.target}" for e in drawn(data, 6)]
    by_length = sorted(range(6), key=lambda i: -len(tokenizer(shots[i].replace(" : ", "\n "))["input_ids"]))
    left = {}
    for example, found in zip(data.test, method.prompts(state, data.test).sources, strict=True):
        for gone in range(7):
            kept = [shots[i] for i in range(6) if i not in by_length[:gone]]
            ids = tokenizer("\n\n".join([*kept, example.text]))["input_ids"]
            if len(ids) <= 48:
                break
        left[example.text] = gone
        assert found == ids
    assert 0 < min(left.values()) < 6
    (said,) = method.take_cuts()
    assert said == (
        f"{len(left)} of {len(left)} prompts have fewer than 6 examples (method.shots): "
        f"{sum(left.values())} of {6 * len(left)} were left out, the longest first; {tiny['llama']} has 64 "
        "positions"
    )
    assert method.take_cuts() == []
    run = fedcustom.run(untuned(generation, shots=6), out=tmp_path / "run")
    (cut,) = run.summary["cuts"]
    assert "were left out, the longest first" in cut
    assert cut in (run.directory / "warnings.log").read_text()


def test_without_room_the_prompt_is_the_zero_shot_one(
    generation: dict[str, Any], tiny: dict[str, str]
) -> None:
    """Cut as that one is."""
    wide = {**generation["data"], "max_length": 40, "max_target_length": 20}
    method, data = built(untuned({**generation, "data": wide}, shots=2))
    shots = state_of(method, data).values["shots"]
    long = [Example(f"{e.text} {'old ' * 60}", target=e.target) for e in data.test[:3]]
    few = method.prompting.tokens(shots, long)
    zero = method.prompting.tokens([], long)
    assert [row.source.tolist() for row in few] == [row.source.tolist() for row in zero]
    assert {len(row.source) for row in few} == {40}
    assert method.prompting.left_out.had == {(e.text, ()): 0 for e in long}


def test_long_inputs_are_cut_behind_examples_as_without(texts: dict[str, Any]) -> None:
    method, data = built(untuned(texts, shots=1))
    state = state_of(method, data)
    long = [Example(f"{'old ' * 60} {e.text}", target=e.target) for e in data.test[:3]]
    (shot,) = [f"{e.text}{e.target}\n\n" for e in drawn(data, 1)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(texts["model"]["base"])
    zero = method.prompts(State({}, {}, {"shots": []}), long).sources
    assert {len(ids) for ids in zero} == {24}
    few = method.prompts(state, long).sources
    expected = [
        tokenizer(shot + tokenizer.decode(ids, skip_special_tokens=True))["input_ids"] for ids in zero
    ]
    assert few == expected


def test_a_text_ends_where_the_next_example_would_begin(
    texts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedcustom.models.inference as inference

    method, data = built(untuned(texts, shots=2))
    state = state_of(method, data)
    monkeypatch.setattr(inference, "generate", lambda *_: [" the cat\n\nkind food thing cake :"] * 2)
    some = data.test[:2]
    assert method.predict(state, some, texts=True).texts == ["the cat"] * 2
    zero = method.predict(State({}, {}, {"shots": []}), some, texts=True).texts
    assert zero == [" the cat\n\nkind food thing cake :"] * 2
    state.values["shots"][0]["answer"] = " two\n\nparts"
    assert method.predict(state, some, texts=True).texts == zero


@pytest.mark.parametrize("task", ["generation", "chat"])
def test_a_run_is_opened_and_exported(
    texts: dict[str, Any],
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
) -> None:
    """What it says again; and the page's code, which runs without this package, says the same."""
    given = texts if task == "generation" else chat_recipe(tmp_path, llama)
    recipe = untuned(given, shots=2, evaluation={"max_new_tokens": 64})
    fedcustom.run(recipe, {"data.max_target_length": 12}, out=tmp_path / "run")
    run, pieces = fedcustom.load(tmp_path / "run"), list[str]()
    item = {"source": "a text"} if task == "generation" else "a text"
    if task == "generation":
        run.recipe.data.__dict__["prompt"] = "{source}"
    (said,) = run.predict([item])
    assert run.write(run.prompt(item), on_text=pieces.append).text == said["text"] == "".join(pieces)
    exported = run.export(tmp_path / "exported")
    page = (exported / "README.md").read_text(encoding="utf-8")
    assert "The prompt holds 2 training rows, word for word." in page
    page = (run.directory / "model" / "README.md").read_text(
        encoding="utf-8"
    )  # an exported one names no path
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "fedcustom" not in code
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(run.directory / "model")
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "page.py"))
    assert capsys.readouterr().out.strip() == said["text"]
    with pytest.raises(RunError, match="leaves the weights of"):
        run.export(tmp_path / "merged", merge=True)


# --- what is refused ---

PLAIN = {"data.references": None, "data.prompt": "{source}", "data.target": "{target}"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"baseline": "federated"},
            "method.shots = 2: puts clients' training rows into everybody's prompt; needs",
        ),
        ({"baseline": "local"}, "baseline = 'centralised', not 'local'"),
        ({"method.shots": -1}, "method.shots = -1: must be greater than or equal to 0"),
        ({"data.task": "classification", **PLAIN}, "allowed for method.name = 'untuned': generation, chat"),
        ({"data.task": "preference", **PLAIN}, "allowed for method.name = 'untuned': generation, chat"),
        ({"personalisation.finetune_epochs": 1}, "baseline = 'federated'"),
        ({"training.learning_rate": "auto"}, "method 'untuned' trains no tensors by steps"),
    ],
)
def test_what_it_does_not_go_with(generation: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(untuned(generation, shots=2), changes)
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_fewer_rows_than_examples(generation: dict[str, Any], tmp_path: Path) -> None:
    few = untuned(generation, shots=60)
    few["data"] = {**few["data"], "limit": 30}
    with pytest.raises(FedcustomError, match=r"method\.shots = 60: there are 27 training rows") as caught:
        fedcustom.run(few, out=tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


def test_an_answer_with_another_number_of_examples(generation: dict[str, Any]) -> None:
    """A server may get none that the recipe does not name, and a client is not asked for a number."""
    method, _ = built(untuned(generation))
    shot: Any = {"messages": [{"role": "user", "content": "a"}], "answer": "b"}
    with pytest.raises(UpdateError, match="shots: 1 examples; the recipe says 0"):
        method.check(ShotsTask(round_number=1), ShotsUpdate(examples=1, shots=[shot]))
    with pytest.raises(UpdateError, match="no tensors"):
        method.check(ShotsTask(round_number=1), ShotsUpdate({"a": torch.ones(1)}, examples=1))


def test_rows_of_one_seed_are_drawn_alike(tmp_path: Path, texts: dict[str, Any]) -> None:
    """Another seed draws others; nothing is drawn twice."""
    found = []
    for seed in (0, 0, 1):
        method, data = built(untuned(texts, shots=8, seed=seed))
        found.append([shot["messages"][0]["content"] for shot in state_of(method, data).values["shots"]])
    assert found[0] == found[1] != found[2]
    rows = [{"source": f"thing {n}", "target": f"{n}"} for n in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    own = {**texts["data"], "source": str(tmp_path / "train.jsonl"), "references": None}
    own |= {"test": None, "development": None}
    method, data = built(
        untuned({**texts, "data": own, "clients": {"partition": "iid", "count": 1}}, shots=4)
    )
    assert len({shot["answer"] for shot in state_of(method, data).values["shots"]}) == 4
