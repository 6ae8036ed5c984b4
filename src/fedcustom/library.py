"""Retrieval from Python: client document indexes on disk, and questions to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .core.errors import RecipeError, RunError
from .core.files import read_json, write_json, write_text
from .data.build import build_data, with_builtin_columns
from .data.examples import ClientData, FederatedData, LearningTask
from .data.truncation import KEEP_END
from .federated.base_model import load_for
from .federated.build import check_fit, make_method
from .federated.resolve import resolved
from .federated.run_directory import record_environment
from .methods.retrieval.method import Retrieval
from .methods.retrieval.settings import RetrievalSettings
from .recipe.paths import absolute
from .recipe.recipe import Recipe, load_recipe, recorded_recipe, to_toml
from .transport.channel import Channel
from .transport.client_store import ClientStore
from .transport.in_process import InProcessTransport

INDEX = "retrieval.json"


@dataclass(frozen=True)
class Passage:
    """A document that was found: whose it is, its score, and its text where its owner shows that."""

    client: str
    document: str
    score: float
    text: str | None


@dataclass(frozen=True)
class Reply:
    """What came of a question. ``cited`` are the places, from 1, of the passages that were used."""

    passages: list[Passage]
    answer: str
    cited: list[int]
    clients_asked: list[str]
    bytes_up: int
    bytes_down: int


def index(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, int]:
    """Build or update every client's index in a folder, and return how many documents each one has.

    Documents that are there already are not embedded again, those that are gone are deleted.

    Raises:
        RecipeError: the recipe's method is another one, or trains its encoder.
        RunError: the folder holds something else, or no client has documents.
    """
    checked, folder = absolute(resolved(load_recipe(recipe, overrides))), Path(out)
    if not isinstance(checked.method, RetrievalSettings):
        raise RecipeError(f"method.name = {checked.method.name!r}: only method retrieval has an index")
    if checked.method.train != "none":
        raise RecipeError(
            f"method.train = {checked.method.train!r}: an index is built with the encoder as it is; "
            "fedcustom run trains it and builds the index too, or set method.train = 'none'"
        )
    known = (folder / INDEX).exists() or (folder / "clients").is_dir()
    if folder.exists() and any(folder.iterdir()) and not known:
        raise RunError(f"{folder}: is not empty and holds no index; name another --out")
    if (folder / "metrics.jsonl").exists():
        raise RunError(f"{folder}: holds a run, which has its own index; name another --out")
    check_fit(checked)
    data, clients = with_builtin_columns(checked.data, checked.clients)
    federation = build_data(data, clients, checked.seed, checked.public)
    method = _connected(checked, folder, federation.clients, federation, note)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.toml", to_toml(checked))
    record_environment(folder, method.base)  # questions are embedded in the precision of the documents
    found = method.prepare(method.initialise())
    for text in method.take_cuts():
        note(text)
    method.searcher.save_router(folder)
    write_json(folder / INDEX, {"clients": sorted(found)})
    return found


def ask(
    directory: str | Path,
    question: str,
    *,
    top: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Reply:
    """Ask the documents of a run or of an index.

    Raises:
        RunError: the directory holds neither.
    """
    return Library(directory, note=note).ask(question, top=top)


class Library:
    """The documents of a run or of an index, ready to be asked.

    Raises:
        RunError: the directory holds neither.
    """

    def __init__(self, directory: str | Path, *, note: Callable[[str], None] = lambda text: None) -> None:
        folder = Path(directory)
        if not (folder / "recipe.toml").exists() or not (folder / INDEX).exists():
            raise RunError(
                f"{folder}: holds no index; build one with fedcustom index RECIPE --out {folder}, or run a "
                "recipe of method retrieval"
            )
        self.recipe = recorded_recipe(folder / "recipe.toml")
        names: list[str] = read_json(folder / INDEX)["clients"]
        self.method = _connected(self.recipe, folder, {n: ClientData(n, []) for n in names}, None, note)
        model = folder / "model"
        self.state = self.method.open(model) if model.is_dir() else self.method.initialise()
        self.method.prepare(self.state, index=False)
        self.method.searcher.load_router(folder)
        self.note = note

    def ask(self, question: str, *, top: int | None = None) -> Reply:
        """The passages for a question, and an answer where the recipe names a generator.

        Raises:
            RunError: the question is empty, or nobody answered.
        """
        if not question.strip():
            raise RunError("the question is empty")
        if lost := self.method.cut_of(question):
            length, how = self.recipe.data.max_length, self.recipe.data.truncation
            kept = "before the last" if KEEP_END in (how.which, how.side) else "after the first"
            self.note(
                f"the question has {length + lost} tokens; those {kept} {length} (data.max_length) are not "
                "looked at"
            )
        self.method.take_cuts()  # of what went before
        searcher = self.method.searcher
        up, down = searcher.bytes_up, searcher.bytes_down
        searched = self.method.search(self.state, [question])
        hits = searched.hits[0][:top]
        shown = searcher.passages(hits, searched.vectors[0])
        hits = self.method.reranked(question, hits, shown)
        answer, places = self.method.answer(question, hits, shown)
        for text in self.method.take_cuts():
            self.note(text)
        return Reply(
            [Passage(hit.client, hit.document, hit.score, shown.get(hit.document)) for hit in hits],
            answer,
            [place + 1 for place in places],
            [n for n, yes in zip(searcher.ready.clients, searched.asked[0].tolist(), strict=True) if yes],
            searcher.bytes_up - up,
            searcher.bytes_down - down,
        )


def _connected(
    recipe: Recipe,
    folder: Path,
    clients: Mapping[str, ClientData],
    federation: FederatedData | None,
    note: Callable[[str], None],
) -> Retrieval:
    """The recipe's method, with a way to clients who keep their documents in the folder."""
    base = load_for(recipe, LearningTask("retrieval"), folder)
    method = make_method(recipe, base, federation)
    assert isinstance(method, Retrieval)
    store = ClientStore(clients, folder / "checkpoints" / "clients", folder / "clients")
    InProcessTransport(method, store, Channel(recipe.compression, {}), note=note)
    return method
