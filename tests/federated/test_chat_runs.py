"""Runs on conversations: what they learn, what they say, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch

import fedcustom
from fedcustom.core.errors import DataError, ModelError, RecipeError
from fedcustom.evaluation.settings import TEXT_METRICS
from fedcustom.recipe.recipe import load_recipe
from helpers.chat import template
from helpers.conversations import SYSTEM, chat_llama, chat_recipe, conversations
from helpers.rows import write_jsonl

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_llama(tmp_path_factory.mktemp("chat") / "llama")


@pytest.mark.parametrize(
    ("method", "rate"),
    [
        ({"name": "full"}, 0.003),
        ({"name": "lora", "rank": 16, "alpha": 64, "target_modules": LINEAR}, 0.005),
    ],
    ids=["full", "lora"],
)
def test_ten_conversations_are_learnt_and_answers_end(
    llama: str, tmp_path: Path, method: dict[str, Any], rate: float
) -> None:
    import peft
    import transformers

    recipe = chat_recipe(tmp_path, llama)
    recipe["method"] = method
    recipe["training"] = {"batch_size": 5, "local_steps": 15, "learning_rate": rate, "schedule": "linear"}
    recipe["rounds"], recipe["evaluation"] = {"count": 20}, {"max_new_tokens": 40, "every": 20}
    fedcustom.run(recipe, out=tmp_path / "run")
    run = fedcustom.load(tmp_path / "run")
    wanted = [row["messages"][-1]["content"] for row in conversations()]
    asked = [row["messages"][:-1] for row in conversations()]
    assert [said["text"] for said in run.predict([{"messages": one} for one in asked])] == wanted
    assert run.predict(["Who is the hen?"]) == [{"text": "The hen has number 3."}]
    assert run.summary["metrics"]["rouge_l"] == pytest.approx(100)

    exported = run.export(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == template("smollm2")
    if method["name"] == "lora":
        base = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        model: Any = peft.PeftModel.from_pretrained(base, str(exported)).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    for messages, text in zip(asked, wanted, strict=True):
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
        assert tokenizer.decode(written[inputs["input_ids"].shape[1] :]) == f"{text}<|im_end|>"


def test_an_answer_ends_by_its_own_token_and_by_those_of_the_model(tmp_path: Path) -> None:
    """As in Gemma and Llama 3, where the end token of texts is another."""
    from fedcustom.data.examples import LearningTask
    from fedcustom.models.load import load_base
    from fedcustom.models.settings import ModelSettings

    place = tmp_path / "gemma"
    folder = chat_llama(place, "gemma", padded_by_end=False)
    said = json.loads((place / "generation_config.json").read_text())
    (place / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [2, 7]}))
    base = load_base(ModelSettings(base=folder), LearningTask("generation", chat=True), 0)
    end = base.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert base.stops == base.model.generation_config.eos_token_id == sorted([2, 7, end])
    assert load_base(ModelSettings(base=folder), LearningTask("generation"), 0).stops == [2]
    run = fedcustom.run(chat_recipe(tmp_path, folder) | {"method": {"name": "full"}}, out=tmp_path / "run")
    exported = json.loads((run.export(tmp_path / "exported") / "generation_config.json").read_text())
    assert exported["eos_token_id"] == base.stops


def test_figures_of_a_run(llama: str, tmp_path: Path) -> None:
    run = fedcustom.run(chat_recipe(tmp_path, llama), out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").open()]
    rows = conversations()
    assert [line["messages"] for line in lines] == [row["messages"][:-1] for row in rows]
    assert [line["source"] for line in lines] == [row["messages"][-2]["content"] for row in rows]
    assert [line["references"] for line in lines] == [[row["messages"][-1]["content"]] for row in rows]
    said, references = [line["prediction"] for line in lines], [line["references"][0] for line in lines]
    chrf = sacrebleu.corpus_chrf(said, [references]).score
    assert run.summary["metrics"]["chrf"] == pytest.approx(chrf)
    copied = sacrebleu.corpus_chrf([line["source"] for line in lines], [references]).score
    assert run.summary["copy"]["chrf"] == pytest.approx(copied)
    assert run.summary["task"] == "chat"
    assert set(run.summary["untuned"]) == {"loss", *TEXT_METRICS}
    assert [one["text"] for one in run.predict(rows)] == said  # a row's last answer is what is asked for


def test_loss_is_that_of_last_answers_by_transformers(llama: str, tmp_path: Path) -> None:
    run = fedcustom.run(chat_recipe(tmp_path, llama), out=tmp_path / "run")
    tokenizer, model = run.tokenizer(), run.model()
    total = count = 0.0
    for row in conversations():
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(f"{row['messages'][-1]['content']}<|im_end|>", add_special_tokens=False)[
            "input_ids"
        ]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        for place, token in enumerate(answer, start=len(prompt)):
            total -= float(logits[place - 1, token])
            count += 1
    assert run.summary["metrics"]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("method", ["prefix", "soft_prompt", "ia3", "adapter", "ln_tuning"])
def test_other_methods_run(llama: str, tmp_path: Path, method: str) -> None:
    recipe = chat_recipe(tmp_path, llama) | {"method": {"name": method}}
    run, pieces = fedcustom.run(recipe, out=tmp_path / "run"), list[str]()
    reply = run.chat([{"role": "user", "content": "Why?"}], pieces.append)
    assert run.predict(["Why?"]) == [{"text": reply.text}]
    assert "".join(pieces) == reply.text


def test_forms_of_conversations_are_one(llama: str, tmp_path: Path) -> None:
    """Messages, TRL's columns of texts or of messages, and templates give the same run."""
    rows = [row["messages"][:2] for row in conversations()]
    forms: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "messages": ([{"messages": row} for row in rows], {}),
        "named": ([{"turns": row} for row in rows], {"messages": "turns"}),
        "texts": ([{"prompt": a["content"], "completion": b["content"]} for a, b in rows], {}),
        "lists": ([{"prompt": [a], "completion": [b]} for a, b in rows], {}),
        "templates": (
            [{"name": a["content"][11:-1], "answer": b["content"]} for a, b in rows],
            {"prompt": "Who is the {name}?", "target": "{answer}"},
        ),
    }
    metrics = {}
    for form, (given, data) in forms.items():
        place = tmp_path / form
        place.mkdir()
        recipe = chat_recipe(place, llama, system="Be brief.", **data)
        write_jsonl(place / "train.jsonl", given)
        run = fedcustom.run(recipe, out=place / "run")
        metrics[form] = run.summary["metrics"]
        line = json.loads((place / "run" / "predictions.jsonl").read_text().splitlines()[0])
        assert line["messages"][0] == {"role": "system", "content": "Be brief."}
        answers = run.predict([given[0]])
        if form in ("messages", "texts"):
            assert run.predict(["Who is the cat?"]) == answers
    assert all(one == metrics["messages"] for one in metrics.values())


def test_a_template_of_the_recipe_stays_with_the_run(llama: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(template("chatml"))
    toml = tmp_path / "recipe.toml"
    import tomli_w

    toml.write_text(tomli_w.dumps(chat_recipe(tmp_path, llama, chat_template="own.jinja")))
    run = fedcustom.run(toml, out=tmp_path / "run")
    said = run.predict(["Who is the cat?"])
    file.unlink()
    again = fedcustom.load(tmp_path / "run")
    assert again.recipe.data.chat_template == template("chatml")
    assert again.tokenizer().chat_template == template("chatml")
    assert again.predict(["Who is the cat?"]) == said


def test_cut_conversations_are_counted(llama: str, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, llama)
    whole = fedcustom.run(recipe, out=tmp_path / "whole")
    assert whole.summary["truncation"]["train"]["inputs"] == 0
    tokenizer = whole.tokenizer()
    lengths = {
        count: [
            len(
                tokenizer.apply_chat_template(row["messages"][:count], add_generation_prompt=True)[
                    "input_ids"
                ]
            )
            for row in conversations()
            if len(row["messages"]) > count
        ]
        for count in (1, 3)
    }
    recipe["data"]["max_length"] = max(lengths[1])
    cut = sum(length > max(lengths[1]) for length in lengths[3])
    run = fedcustom.run(recipe, out=tmp_path / "run")
    assert cut
    assert run.summary["truncation"]["train"]["inputs"] == cut
    assert list(run.summary["truncation"]["train"]["tokens"]) == ["oldest exchanges"]
    recipe["data"]["max_length"] = 8
    with pytest.raises(
        DataError, match=r"train.jsonl, train, line \d+: the conversation takes \d+ tokens with"
    ):
        fedcustom.run(recipe, out=tmp_path / "refused")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            [USER, {"role": "bot", "content": "b"}],
            r"message 2: role 'bot'; allowed: system, user, assistant, tool",
        ),
        ([USER, {"role": "assistant", "content": ""}], "message 2: content is empty"),
        ([USER, {"role": "assistant", "content": " "}], "message 2: content is blank"),
        ([USER, {"role": "assistant"}], "message 2: content is empty"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}], "must be one text"),
        ([USER, {**ANSWER, "tool_calls": [1]}], "'tool_calls' is not supported; allowed: role, content"),
        ([ANSWER, USER, ANSWER], "message 1: role 'assistant' begins the conversation; a user has to"),
        ([USER], "no turn of the assistant; a conversation has to end with an answer"),
        ([USER, ANSWER, USER], "it ends with role 'user'; a conversation has to end with an answer"),
        (
            [USER, {"role": "system", "content": "c"}, ANSWER],
            "role 'system' is allowed at the beginning alone",
        ),
        ([{"role": "system", "content": "c"}], "no turn of a user"),
        ([], "holds an empty list of messages"),
        ("text", "holds a value of type str; it must hold a list of messages"),
        (["text"], "message 1: must be an object with role and content"),
        ([{"role": "user", "content": "a<|im_end|>"}, ANSWER], "control token '<|im_end|>' in message 1"),
    ],
)
def test_bad_rows_name_file_and_line(llama: str, tmp_path: Path, row: Any, said: str, command: Any) -> None:
    recipe = chat_recipe(tmp_path, llama)
    write_jsonl(tmp_path / "train.jsonl", [*conversations()[:3], {"messages": row}, *conversations()])
    with pytest.raises(DataError, match=r"train.jsonl, .*line 4: .*" + said.replace("|", r"\|")):
        fedcustom.run(recipe, out=tmp_path / "run")


def test_rows_that_the_template_refuses(tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, chat_llama(tmp_path / "mistral", "mistral", padded_by_end=False))
    write_jsonl(
        tmp_path / "train.jsonl", [*conversations()[:3], {"messages": [USER, USER, ANSWER]}, *conversations()]
    )
    with pytest.raises(
        DataError, match=r"line 4: the conversation is refused by the chat template: .*alternate"
    ):
        fedcustom.run(recipe, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.truncate": "keep-end"}, "leave it at 'auto'"),
        (
            {"data.task": "generation", "data.system": "a"},
            "data.system: has a meaning for data.task = 'chat' or 'preference' alone",
        ),
        ({"data.messages": "m", "data.target": "{a}"}, "data.messages = 'm': does not go with data.target"),
        ({"public.fraction": 0.5}, r"\[public\]: no method for data.task = 'chat'"),
        ({"method": {"name": "prompt_engineering"}}, "data.task = 'chat': allowed for method.name = 'prompt"),
        ({"evaluation.metric": "accuracy"}, "allowed for chat: loss"),
        ({"data.chat_template": "/nowhere.jinja"}, "data.chat_template = '/nowhere.jinja': No such file"),
    ],
)
def test_refused_recipes(llama: str, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        fedcustom.run(chat_recipe(tmp_path, llama), changes, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "said"), [("bart", "need a causal language model"), ("llama", "no chat template")]
)
def test_models_without_conversations(tiny: dict[str, str], tmp_path: Path, kind: str, said: str) -> None:
    recipe = chat_recipe(tmp_path, tiny[kind], max_length=20, max_target_length=20)
    recipe["method"] = {"name": "full"}
    with pytest.raises(ModelError, match=said):
        fedcustom.run(recipe, out=tmp_path / "run")


def test_a_step_is_that_of_transformers(llama: str, tmp_path: Path) -> None:
    """One step of plain gradient descent on the loss over all answers, each with its end-of-turn token."""
    import transformers

    recipe = chat_recipe(tmp_path, llama)
    recipe |= {
        "method": {"name": "full"},
        "rounds": {"count": 1},
        "clients": {"partition": "iid", "count": 1},
    }
    recipe["clients"] |= {"test_fraction": 0.0, "development_fraction": 0.0}
    recipe["training"] = {
        "batch_size": 10, "local_steps": 1, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1,
        "clip_norm": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    run = fedcustom.run(recipe, {"evaluation.select": "last"}, out=tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = run.tokenizer()
    total, count = torch.zeros(()), 0
    for row in conversations():
        ids, labels = list[int](), list[int]()
        default = {
            "role": "system",
            "content": SYSTEM.removeprefix("system ").removesuffix(" user assistant"),
        }
        for message in [default, *row["messages"]]:
            head, end = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
            for text, learnt in ((head, False), (end, message["role"] == "assistant"), ("\n", False)):
                some = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += some
                labels += some if learnt else [-100] * len(some)
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label >= 0 for label in labels)
    loss = total / count
    loss.backward()
    said = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert said["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    trained = run.model().state_dict()
    for name, tensor in model.named_parameters():
        wanted = tensor.detach() - 0.1 * tensor.grad
        assert torch.allclose(trained[name], wanted, atol=1e-6), name


def test_clients_in_one_batch_get_what_they_get_alone(llama: str, tmp_path: Path) -> None:
    recipe, found = chat_recipe(tmp_path, llama), []
    for width in (1, 2):
        run = fedcustom.run(recipe, {"training.cohort_width": width}, out=tmp_path / str(width))
        found.append({k: v for k, v in run.model().state_dict().items() if "lora_" in k})
    assert found[0].keys() == found[1].keys() != set()
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name


def test_an_export_is_compared_and_its_page_begins_with_the_system_message(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCUSTOM_EXPORT_CHECK", "on")
    run = fedcustom.run(
        chat_recipe(tmp_path, llama, system='Say "it".'), {"rounds.count": 1}, out=tmp_path / "run"
    )
    notes: list[str] = []
    run.export(tmp_path / "exported", note=notes.append)
    assert [note for note in notes if "licence" not in note] == []  # of this folder it is not known
    page = (tmp_path / "exported" / "README.md").read_text()
    end = run.tokenizer().eos_token_id
    assert 'messages.insert(0, {"role": "system", "content": \'Say "it".\'})\n' in page
    assert f"eos_token_id=[{end}]" in page


def test_perturbed_questions_and_a_report(llama: str, tmp_path: Path) -> None:
    from fedcustom.report import comparison_table, write_report

    recipe = chat_recipe(tmp_path, llama)
    run = fedcustom.run(
        recipe, {"evaluation.perturb": ["words"], "evaluation.perturb_rate": 0.5}, out=tmp_path / "run"
    )
    assert run.summary["perturbed"]["words"]["loss"] != run.summary["metrics"]["loss"]
    page = write_report([run.directory], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Who is the cat?" in page
    assert comparison_table([run.directory]).row_count >= 3  # the run, the untuned model, copies


def test_parquet_files_hold_conversations(llama: str, tmp_path: Path) -> None:
    import pandas as pd

    found = []
    for kind in ("jsonl", "parquet", "json"):
        place = tmp_path / kind
        place.mkdir()
        recipe = chat_recipe(place, llama)
        if kind == "parquet":
            pd.DataFrame(conversations()).to_parquet(place / "train.parquet")
        elif kind == "json":
            (place / "train.json").write_text(json.dumps(conversations()))
        recipe["data"]["source"] = str(place / f"train.{kind}")
        found.append(fedcustom.run(recipe, {"rounds.count": 1}, out=place / "run").summary["metrics"])
    assert found[0] == found[1] == found[2]


def test_methods_are_compared(llama: str, tmp_path: Path, command: Any) -> None:
    import tomli_w

    (tmp_path / "chat.toml").write_text(
        tomli_w.dumps(chat_recipe(tmp_path, llama) | {"rounds": {"count": 1}})
    )
    said = command(
        "compare", tmp_path / "chat.toml", "--methods", "lora,prefix", "--baselines", "centralised,local",
        "--out", tmp_path / "runs", "--quiet",
    )  # fmt: skip
    assert said.code == 0, said.error
    for name in ("federated lora", "federated prefix", "centralised lora", "local lora", "untuned", "copy"):
        assert name in said.out


def test_conversations_that_are_too_long_can_be_left_out_and_are_counted(llama: str, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, llama)
    recipe["rounds"], recipe["evaluation"] = {"count": 1}, {"generate": False}
    long = [{"messages": [{"role": "user", "content": "Who is the cat? " * 60}, ANSWER]}] * 2
    write_jsonl(tmp_path / "train.jsonl", [*conversations(), *long, *conversations()])
    recipe["data"] |= {"source": str(tmp_path), "train": "train"}
    with pytest.raises(DataError, match=r"line 11: the conversation takes .*data.too_long = 'leave-out'"):
        fedcustom.run(recipe, out=tmp_path / "refused")
    run = fedcustom.run(recipe, {"data.too_long": "leave-out"}, out=tmp_path / "run")
    cuts = run.summary["truncation"]
    assert sum(part["left_out"] for part in cuts.values()) >= 2
    assert "are left out: " in (run.directory / "warnings.log").read_text()
    used = sum(cuts[part]["examples"] for part in ("train", "development", "test") if part in cuts)
    assert used >= 20

    write_jsonl(tmp_path / "test.jsonl", long)
    with pytest.raises(DataError, match=r"test: every conversation is longer than data.max_length"):
        fedcustom.run(recipe, {"data.too_long": "leave-out", "data.test": "test"}, out=tmp_path / "test")

    write_jsonl(tmp_path / "train.jsonl", long * 3)
    with pytest.raises(
        DataError, match=r"client .*: every conversation to train on is longer than data.max_"
    ):
        fedcustom.run(recipe, {"data.too_long": "leave-out"}, out=tmp_path / "none")


def test_only_conversations_are_left_out() -> None:
    with pytest.raises(RecipeError, match=r"data.too_long: has a meaning for data.task = 'chat' or"):
        load_recipe({"data": {"too_long": "leave-out"}})
