"""A site whose rows have changed since a run began there: refused, or accepted and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fedcustom.core.errors import DeploymentError
from fedcustom.core.files import write_json
from fedcustom.deployment.local import PREPARED, _prepared, check_prepared, prepare
from fedcustom.deployment.site.data import SiteDataSettings
from fedcustom.deployment.site.process import changes_told
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.rows import CHANGED, FILE, GONE, DataChanged, Rows, difference
from fedcustom.deployment.site.settings import PolicySettings, SiteSettings
from fedcustom.federated.fingerprint import files_of
from fedcustom.federated.resolve import resolved
from fedcustom.methods import Work
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.messages import values_of
from helpers.rows import make_rows, write_jsonl

RUN, OTHER = "0123456789abcdef", "f" * 16

NAMES = [f"site-{number}" for number in range(4)]

LABELS = ["animal", "food", "place"]

Row = dict[str, Any]


class Site:
    """A site by itself, which can be restarted with other rows or another option."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder = folder
        self.content = resolved(load_recipe(recipe)).model_dump(mode="json", exclude_none=True)
        self.rows = [row for row in make_rows(160, 0) if row["site"] == "site-1"]
        self.settings: dict[str, Any] = {"train": "train.jsonl", "text": "{text}"}
        self.base_model = recipe["model"]["base"]
        self.write()
        self.start()

    def write(self, rows: list[Row] | None = None, name: str = "train.jsonl") -> None:
        write_jsonl(self.folder / name, self.rows if rows is None else rows)

    def start(self, data_changed: DataChanged = "refuse") -> None:
        data = SiteDataSettings(**self.settings, columns=["text", "label"], label="label", max_labels=4)
        policy = PolicySettings(sums=True, least_examples=1, base_models=[self.base_model])
        site = SiteSettings(data=data, policy=policy)
        self.resident = Resident("site-1", site, self.folder, self.folder / "own", data_changed=data_changed)

    def describe(self, run: str = RUN) -> dict[str, Any]:
        values = {"recipe": self.content}
        return dict(self.resident.handle({"kind": "describe", "run": run, "values": values}))

    def open(self, run: str = RUN, names: list[str] = NAMES) -> dict[str, Any]:
        values = {"names": names, "labels": LABELS}
        return dict(self.resident.handle({"kind": "open", "run": run, "values": values}))

    def begin(self, run: str = RUN) -> None:
        assert "values" in self.describe(run)
        assert "values" in self.open(run)
        assert "values" in self.work(1, run)

    def work(self, number: int, run: str = RUN) -> dict[str, Any]:
        """A task of a round; after a restart as the server sends it, which does not know of that."""
        if number == 1:
            assert self.resident.participant is not None
            method = self.resident.participant.method
            self.task = method.configure(method.initialise(), 1, {"site-1": Work(epochs=1)})["site-1"]
            safetensors.torch.save_file(self.task.tensors, self.folder / "in.safetensors")
        message = {"kind": "work", "run": run, "task": self.task.kind, "round": number}
        values = {**values_of(self.task), "round": number}
        return dict(
            self.resident.handle({**message, "values": values, "body": str(self.folder / "in.safetensors")})
        )

    def audit(self, event: str = "data changed") -> list[dict[str, Any]]:
        lines = (self.folder / "own" / "audit.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]

    @property
    def record(self) -> Rows:
        found: Rows = json.loads((self.folder / "own" / "runs" / RUN / FILE).read_text())
        return found


@pytest.fixture
def site(small: dict[str, Any], tmp_path: Path) -> Site:
    small["rounds"] = {"count": 3}
    small["training"] |= {"logit_adjustment": 0.0, "fit_head_rounds": []}
    return Site(tmp_path, small)


# --- what differs, by hand ---


@pytest.mark.parametrize(
    ("now", "text"),
    [
        ({}, ""),
        ({"train": ["a", "b", "x"]}, "train: 1 changed (3 rows then, 3 now)"),
        ({"train": ["a", "b", "c", "x", "y"]}, "train: 2 added (3 rows then, 5 now)"),
        ({"train": ["x", "a", "b", "c"]}, "train: 1 added (3 rows then, 4 now)"),
        ({"train": ["c"]}, "train: 2 removed (3 rows then, 1 now)"),
        ({"train": ["x", "b"]}, "train: 1 changed, 1 removed (3 rows then, 2 now)"),
        ({"train": ["a", "a", "b", "c"]}, "train: 1 added (3 rows then, 4 now)"),
        ({"train": ["c", "b", "a"]}, "train: the same rows in another order"),
        ({"public": []}, "public: 1 removed (1 row then, 0 now)"),
        (
            {"train": ["a", "b", "t"], "test": ["c"]},
            "train: 1 changed (3 rows then, 3 now); test: 1 changed (1 row then, 1 now); all in all "
            "the same rows, divided otherwise (5 rows then, 5 now); 1 row held out before would be "
            "trained on",
        ),
        (
            {"train": ["a", "b", "c", "d", "t"], "development": [], "test": []},
            "train: 2 added (3 rows then, 5 now); development: 1 removed (1 row then, 0 now); "
            "test: 1 removed (1 row then, 0 now); all in all the same rows, divided otherwise "
            "(5 rows then, 5 now); 2 rows held out before would be trained on",
        ),
    ],
)  # fmt: skip
def test_what_differs(now: Rows, text: str) -> None:
    then = {"train": ["a", "b", "c"], "development": ["d"], "test": ["t"], "public": ["p"]}
    assert difference(then, {**then, **now}) == text


# --- rows that change ---


def changed(rows: list[Row], how: str) -> list[Row]:
    if how == "text":
        return [{**rows[0], "text": "another"}, *rows[1:]]
    if how == "label":
        return [{**rows[0], "label": next(x for x in LABELS if x != rows[0]["label"])}, *rows[1:]]
    if how == "new label":
        return [{**rows[0], "label": "stone"}, *rows[1:]]
    if how == "more":
        return [*rows, {**rows[0], "text": "one more"}]
    if how == "fewer":
        return rows[:-4]
    return rows[::-1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("text", "1 changed ("),
        ("label", "1 changed ("),
        ("new label", "label 'stone'"),
        ("more", "all in all 1 added (40 rows then, 41 now)"),
        ("fewer", "all in all 4 removed (40 rows then, 36 now)"),
        ("order", "divided otherwise"),
    ],
)
@pytest.mark.parametrize("when", ["the server resumes", "the site restarts"])
def test_other_rows_are_refused_and_the_server_learns_only_that(
    site: Site, how: str, said: str, when: str
) -> None:
    site.begin()
    site.write(changed(site.rows, how))
    site.start()
    told = site.describe() if when == "the server resumes" else site.work(2)
    assert told == {"refused": CHANGED}
    (line,) = site.audit()
    assert line["run"] == RUN
    assert not line["accepted"]
    assert said in line["text"]
    assert "--data-changed=accept" in line["text"]
    assert site.audit("refused")[-1]["reason"] == CHANGED
    if when == "the site restarts":
        assert site.work(2) == {"refused": CHANGED}
        assert len(site.audit()) == 1, "what changed is said once, however often the run asks"
    site.write()  # as they were: the site takes part again
    site.start()
    assert "values" in site.describe()
    assert "values" in site.open()
    assert "values" in site.work(2)


def test_held_out_rows_do_not_move_into_training(site: Site) -> None:
    """Counted by hand from the two splits that the recipe makes of the rows."""
    site.begin()
    assert site.resident.participant is not None
    data = site.resident.participant.data
    held_out = {row.text for row in [*data.development, *data.test]} - {row.text for row in data.train}
    site.write(site.rows[1:])
    site.start()
    assert site.describe() == {"refused": CHANGED}
    (text,) = [line["text"] for line in site.audit()]
    site.start("accept")
    site.describe()
    site.open()
    assert site.resident.participant is not None
    moved = sum(row.text in held_out for row in site.resident.participant.data.train)
    assert moved > 0
    assert f"{moved} row{'s' * (moved > 1)} held out before would be trained on" in text


def test_the_same_rows_go_on_even_from_another_file(site: Site) -> None:
    site.begin()
    before = site.record
    assert {part: len(rows) for part, rows in before.items()} == {
        "train": 32, "development": 4, "test": 4, "public": 0,
    }  # fmt: skip
    (site.folder / "train.csv").write_text(
        "label,text,secret\n" + "".join(f"{row['label']},{row['text']},7\n" for row in site.rows)
    )
    site.settings["train"] = "train.csv"
    site.start()
    assert "values" in site.work(2)
    site.start()
    assert "values" in site.describe()
    assert "values" in site.open()
    assert site.record == before
    assert not site.audit()
    text = (site.folder / "own" / "runs" / RUN / FILE).read_text()
    assert not any(word in text for row in site.rows for word in row["text"].split() if len(word) > 2)


def test_a_template_or_a_file_of_its_own_changes_rows_too(site: Site) -> None:
    """What the site's file says decides what is trained on, as do the rows."""
    site.begin()
    site.settings["text"] = "{text}!"
    site.start()
    assert site.work(2) == {"refused": CHANGED}
    site.settings["text"] = "{text}"
    site.settings["test"] = "test.jsonl"
    site.write(make_rows(8, 5), "test.jsonl")
    site.start()
    assert site.work(2) == {"refused": CHANGED}
    assert "test: " in site.audit()[-1]["text"]


@pytest.mark.parametrize("part", ["development", "test"])
def test_rows_to_evaluate_on_may_not_change_either(site: Site, part: str) -> None:
    site.settings[part] = f"{part}.jsonl"
    rows = make_rows(12, 7)
    site.write(rows, f"{part}.jsonl")
    site.start()
    site.begin()
    site.write(rows[:-1], f"{part}.jsonl")
    site.start()
    tensors = {"kind": "evaluate", "run": RUN, "part": part, "after": 1, "values": {}}
    assert site.resident.handle(tensors) == {"refused": CHANGED}
    assert f"{part}: 1 removed (12 rows then, 11 now)" in site.audit()[-1]["text"]
    assert "train: " not in site.audit()[-1]["text"]


def test_a_row_moved_from_the_test_file_into_training(site: Site) -> None:
    tests = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(12, 7))]
    site.settings |= {"test": "test.jsonl", "split": False}
    site.write(tests, "test.jsonl")
    site.start()
    site.begin()
    site.write([*site.rows, tests[0]])
    site.write(tests[1:], "test.jsonl")
    site.start()
    assert site.describe() == {"refused": CHANGED}
    text = site.audit()[-1]["text"]
    assert "train: 1 added (40 rows then, 41 now); test: 1 removed (12 rows then, 11 now)" in text
    assert "1 row held out before would be trained on" in text


# --- accepted ---


def test_accepted_rows_become_those_of_the_run(site: Site) -> None:
    site.begin()
    site.write(changed(site.rows, "more"))
    site.start("accept")
    assert site.describe()["values"]["rows"] == 41
    assert site.open()["values"]["sizes"] != {"train": 32, "development": 4, "test": 4}
    (line,) = site.audit()
    assert line["accepted"]
    assert "all in all 1 added" in line["text"]
    assert "values" in site.work(2)
    site.start()  # without the option
    assert "values" in site.work(3)
    site.write()
    site.start()
    assert site.work(3) == {"refused": CHANGED}


def test_in_the_midst_of_a_run_the_numbers_that_were_told_stay(site: Site) -> None:
    """The server refuses weights other than announced, so that the run is resumed first."""
    site.begin()
    site.write(changed(site.rows, "text"))
    site.start("accept")
    assert "values" in site.work(2), "as many rows as were told"
    site.write(changed(site.rows, "more"))
    site.start("accept")
    said = site.work(3)
    assert said == {"refused": f"{CHANGED}; it takes part again once the run is resumed"}
    assert "deploy run --resume" in site.audit()[-1]["text"]
    assert "values" in site.describe()
    assert "values" in site.open()
    assert "values" in site.work(3)


# --- what a site remembers ---


@pytest.mark.parametrize("gone", ["memory", "record", "record damaged"])
def test_a_deleted_memory_is_said_and_not_guessed(site: Site, gone: str) -> None:
    site.begin()
    folder = site.folder / "own" / "runs" / RUN
    if gone == "memory":
        shutil.rmtree(folder)
    elif gone == "record":
        (folder / FILE).unlink()
    else:
        (folder / FILE).write_text('{"train": 3}')
    site.start()
    assert site.describe() == {"refused": GONE}
    if gone == "memory":
        assert "not open" in site.work(2)["error"]
    else:
        assert site.work(2) == {"refused": GONE}
    assert "is gone or damaged" in site.audit()[-1]["text"]
    site.start("accept")
    assert "values" in site.describe()
    assert "values" in site.open()
    assert site.audit()[-1]["accepted"]
    site.start()
    assert "values" in site.work(2)
    assert len(site.record["train"]) == 32


def test_a_site_that_joins_late_begins_with_what_it_has(site: Site) -> None:
    """It was shown the run once, and did nothing in it."""
    assert "values" in site.describe()
    site.write(changed(site.rows, "more"))
    site.start()
    assert "values" in site.describe()
    assert "values" in site.open()
    assert len([row for part in site.record.values() for row in part]) == 41
    assert not site.audit()


def test_another_run_may_have_other_rows(site: Site) -> None:
    site.begin()
    site.write(changed(site.rows, "more"))
    site.start()
    site.begin(OTHER)
    assert not site.audit()
    assert site.work(2) == {"refused": CHANGED}


def test_a_member_that_leaves_moves_no_rows_of_the_others(site: Site) -> None:
    """What a site holds out depends on its number in the run, which stays the one that it began with."""
    site.begin()
    before = site.record
    assert "values" in site.describe()
    assert "values" in site.open(names=["site-1", "site-3"])
    assert site.record == before
    site.start()
    assert "values" in site.work(2)
    assert not site.audit()


@pytest.mark.parametrize(
    "change", [{"seed": 99}, {"clients": {"test_fraction": 0.5}}, {"clients": {"limit": 20}}]
)
def test_another_recipe_under_the_name_of_the_run_moves_no_rows(site: Site, change: dict[str, Any]) -> None:
    site.begin()
    before = site.record
    for key, value in change.items():
        site.content[key] = {**site.content[key], **value} if isinstance(value, dict) else value
    for _ in range(2):
        assert "values" in site.describe()
        assert site.open()["values"]["sizes"] == {"train": 32, "development": 4, "test": 4}
        assert site.record == before
        site.start()
    assert not site.audit()
    assert "values" in site.describe(OTHER), "another run is divided by its own recipe"
    assert (
        site.open(OTHER)["values"]["sizes"] != {"train": 32, "development": 4, "test": 4} or "seed" in change
    )


def test_the_administrator_sees_it_on_the_console(site: Site) -> None:
    site.begin()
    told = changes_told(site.folder / "own" / "audit.jsonl")
    assert next(told) == []
    site.write(changed(site.rows, "more"))
    site.start()
    site.describe()
    (line,) = next(told)
    assert line.startswith(f"run {RUN}: this site's rows are not those that it began with: train: ")
    assert next(told) == []


def test_the_console_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    told = changes_told(log)
    assert next(told) == []
    line = json.dumps({"event": "data changed", "run": RUN, "text": "x"})
    log.write_text(line[:20])
    assert next(told) == []
    log.write_text(f"{line}\n{line[:9]}")
    assert next(told) == [f"run {RUN}: x"]
    log.write_text(f"{line}\n{line}\n")
    assert next(told) == [f"run {RUN}: x"]


def test_a_try_out_notices_that_its_sites_hold_other_rows(small: dict[str, Any], tmp_path: Path) -> None:
    """Sites of a try-out have copies, which are made once."""
    shutil.copytree(small["data"]["source"], tmp_path / "rows")
    recipe = load_recipe({**small, "data": {**small["data"], "source": str(tmp_path / "rows")}})
    prepare(resolved(recipe), tmp_path / "f", 8123)
    write_json(tmp_path / "f" / PREPARED, {**_prepared(recipe, 8123), "files": files_of(recipe)})
    check_prepared(recipe, tmp_path / "f", 8123)
    with pytest.raises(DeploymentError, match="other data, clients, seed or port"):
        check_prepared(recipe, tmp_path / "f", 8124)
    train = tmp_path / "rows" / "train.jsonl"
    before = train.read_text()
    write_jsonl(train, make_rows(159, 0))
    with pytest.raises(
        DeploymentError, match=rf"other rows: {train} has changed since; .*name another --out"
    ):
        check_prepared(recipe, tmp_path / "f", 8123)
    train.write_text(before)
    check_prepared(recipe, tmp_path / "f", 8123)
    train.unlink()  # the sites have their copies
    check_prepared(recipe, tmp_path / "f", 8123)


def test_the_option_reaches_the_resident_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    given: list[str] = []
    monkeypatch.setattr(
        "fedcustom.deployment.site.process.start_site",
        lambda *_, data_changed: given.append(data_changed),
    )
    for options in ([], ["--data-changed=accept"], ["--data-changed", "refuse"]):
        assert command("site", "start", tmp_path, "--data", tmp_path / "site.toml", *options).code == 0
    assert given == ["refuse", "accept", "refuse"]
    assert command("site", "start", tmp_path, "--data", "x", "--data-changed=yes").code == 2
