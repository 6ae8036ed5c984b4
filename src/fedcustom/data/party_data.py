"""A party's own data: files with columns of their own names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from ..core.errors import DataError
from ..core.settings import Settings
from .build import draw, split_client
from .cells import Row
from .conversations import with_conversation_columns
from .examples import ClientData, Example, columns, make_examples
from .files import read_file
from .public import read_public
from .settings import ClientSettings, DataSettings, PublicSettings
from .sources import require_columns
from .templates import checked


class OwnDataSettings(Settings):
    """Where a party keeps its data. Paths are relative to the file that names them; they never travel."""

    train: str | None = Field(None, description="JSONL, CSV or Parquet file with the training rows")
    development: str | None = Field(
        None, description="File with development rows; unset: the recipe's part of the training rows"
    )
    test: str | None = Field(None, description="File with test rows; unset: the recipe's part, likewise")
    public: str | None = Field(
        None, description="File with the public texts, where the method needs some: the same at every party"
    )
    split: bool = Field(
        True,
        description="Whether development and test parts that are unset are cut off the training rows, as the "
        "recipe says; false: there are none",
    )
    text: str | None = Field(None, description="Template of the input; unset: the recipe's data.text")
    label: str | None = Field(None, description="Column of the label; unset: the recipe's data.label")
    prompt: str | None = Field(None, description="Template of the prompt; unset: the recipe's data.prompt")
    target: str | None = Field(None, description="Template of the target; unset: the recipe's data.target")
    chosen: str | None = Field(
        None, description="Template of the preferred answer; unset: the recipe's data.chosen"
    )
    rejected: str | None = Field(
        None, description="Template of the rejected answer; unset: the recipe's data.rejected"
    )
    messages: str | None = Field(
        None, description="Column with lists of messages; unset: the recipe's data.messages"
    )
    references: str | None = Field(
        None, description="Column with accepted texts; unset: the recipe's data.references"
    )
    options: str | None = Field(
        None, description="Column with the answers to choose from; unset: the recipe's data.options"
    )
    truncate: str | None = Field(
        None, description="What is cut of an input that is too long; unset: the recipe's data.truncate"
    )

    _templates = field_validator("text", "prompt", "target", "chosen", "rejected")(checked)


@dataclass(frozen=True)
class OwnData:
    """A party's rows as they were read, and how they become examples."""

    settings: DataSettings
    train: list[Row]
    development: list[Row]
    test: list[Row]
    public: list[Example]
    split: bool

    def examples(self, part: str, labels: Sequence[str]) -> list[Example]:
        """The examples of one part.

        Raises:
            DataError: an empty value, or a label that is not among ``labels``.
        """
        rows: list[Row] = getattr(self, part)
        scoring = part != "train"
        if rows:
            require_columns(rows, [*columns(self.settings, scoring=scoring)], f"the {part} file")
        return make_examples(rows, self.settings, labels, scoring=scoring, where=f"the {part} file")

    def client(
        self, name: str, number: int, labels: Sequence[str], clients: ClientSettings, seed: int
    ) -> ClientData:
        """This party as the client of that name and number, with what it did not split itself split by the
        recipe, just as a simulation would.

        Raises:
            DataError: there is nothing to train on, or see :meth:`examples`.
        """
        train = self.examples("train", labels)
        development, test = self.examples("development", labels), self.examples("test", labels)
        if not self.split or (development and test):
            if not train:
                raise DataError(f"client {name!r} has no examples to train on")
            return ClientData(name, train, development, test)
        kept = draw(train, clients.limit, [seed, 3, number])
        settings = self.settings.model_copy(update={"development": "own" if development else None})
        cut = split_client(name, kept, test or None, settings, clients, [seed, 4, number])
        return ClientData(name, cut.train, development or cut.development, cut.test)


def read_own(
    own: OwnDataSettings,
    folder: Path,
    data: DataSettings,
    public: PublicSettings,
    *,
    keep: Collection[str] | None = None,
) -> OwnData:
    """Read the files that a party names. Of their columns only those in ``keep`` are kept; None: all.

    Raises:
        DataError: a file is missing, empty or malformed, or lacks a column.
    """
    renamed = {
        key: value
        for key in (
            *("text", "label", "prompt", "target", "chosen", "rejected"),
            *("messages", "references", "options", "truncate"),
        )
        if (value := getattr(own, key)) is not None
    }
    # Training rows need columns of scores only where a test part comes out of them.
    settings = data.model_copy(update={**renamed, "test": own.test if own.test or own.split else ""})

    def rows(name: str | None) -> list[Row]:
        if name is None:
            return []
        found = read_file((folder / name).expanduser())
        if not found:
            raise DataError(f"{folder / name}: is empty")
        if keep is None:
            return found
        columns_kept = [column for column in found[0] if column in keep]
        return [row.only(columns_kept) for row in found]

    train, development, test = rows(own.train), rows(own.development), rows(own.test)
    if first := next((part[0] for part in (train, development, test) if part), None):
        settings = with_conversation_columns(settings, list(first))
    if train:
        require_columns(train, [*columns(settings, scoring=False)], str(own.train))
    texts: list[Example] = []
    if own.public is not None:
        source = public.model_copy(
            update={"source": str((folder / own.public).expanduser()), "fraction": 0.0}
        )
        texts = read_public(source, settings)
    return OwnData(settings, train, development, test, texts, own.split)
