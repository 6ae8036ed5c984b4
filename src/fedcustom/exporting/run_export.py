"""The export of a finished run: a copy of the model, a merged one, or one that is distilled from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..core.errors import ExportError, RunError
from ..core.files import read_json, write_text
from ..core.folders import fill_folder, usable_folder
from ..data.conversations import Message
from ..data.examples import Example, LearningTask
from ..evaluation.calibration import softmax
from ..federated.base_model import load_for
from ..methods import Method, State, WeightTuning
from ..methods.prefix.memory_export import FILE as CODE
from ..methods.tuning.export_check import (
    ROWS,
    UNCHECKED,
    ComparesExport,
    Reference,
    ReferenceRow,
    check_export,
    reference,
    some,
    wanted,
)
from ..methods.tuning.model_card import bundle
from ..models.quantised_layers import exact_weights
from ..recipe.recipe import Recipe
from .card import with_card
from .merge import ADAPTER, merges, write_merged


@dataclass(frozen=True)
class RunExport:
    """The export of the model in a run's ``directory``. ``built`` gives the method and the state that it
    finished with; ``note`` is told what users should know.
    """

    directory: Path
    recipe: Recipe
    task: LearningTask
    built: Callable[[], tuple[Method, State]]
    note: Callable[[str], None]

    def write(
        self,
        target: Path,
        form: str,
        text: str | Path | None,
        slots: int | None,
        *,
        check: bool,
        merge: bool = False,
    ) -> Path:
        """Write the model in one of its forms (:meth:`fedcustom.api.Run.export`).

        Raises:
            RunError: see there.
        """
        source = self.directory / "model"
        if usable_folder(target).is_relative_to(source.resolve()):
            raise RunError(f"{target}: lies in the run's own model folder; name a folder elsewhere")
        if merge and form != "model":
            raise RunError(f"{self.directory}: --merge and --as {form} are two forms; choose one")
        merge = merge and self._merges()
        if self._folds(form, text, slots):
            return self._write_folded(target, Path(str(text)), slots, check=wanted(check))
        expected = self._reference() if wanted(check) else None
        if not wanted(check):
            self.note("the exported model is not compared with the trained one: switched off")

        def fill(folder: Path) -> None:
            if merge:
                write_merged(self.directory, self.recipe, self.task, folder)
            else:
                shutil.copytree(source, folder, dirs_exist_ok=True)
                bundle(folder, self.recipe.model.base)
            self._write_card(folder)
            if expected is not None and (text := check_export(folder, expected)):
                self.note(text)

        fill_folder(target, fill, last=("README.md", "adapter_config.json", "config.json"))
        return target

    def _merges(self) -> bool:
        """Whether there is something to merge; ``note`` is told where there is not."""
        if merges(self.directory, self.recipe):
            return True
        self.note("--merge: the run's model is whole already, and is copied")
        return False

    def _write_card(self, folder: Path) -> None:
        """Make a model card of an exported folder's page, where it has one."""
        page = folder / "README.md"
        if not page.exists():
            return
        summary = read_json(self.directory / "summary.json")
        method, _ = self.built()
        text = page.read_text(encoding="utf-8")
        base = Path(self.recipe.model.base)
        if base.is_absolute() and not (folder / ADAPTER).exists():  # only the heading names the base then
            text = text.replace(str(base), base.name)
        card = with_card(text, folder, self.directory, self.recipe, summary, method)
        write_text(page, card)
        if "license" not in card.partition("\n---\n")[0]:
            self.note(f"the licence of {self.recipe.model.base} is not known here; the card leaves it out")

    def _folds(self, form: str, text: str | Path | None, slots: int | None) -> bool:
        """Whether an export needs a model that is distilled from the run's own.

        Raises:
            RunError: what was asked for does not fit the run's method, or texts are missing.
        """
        if form == "feed-forward" and not self.recipe.method.has_hidden_units:
            raise RunError(
                f"{self.directory}: --as feed-forward: what this method trains does not fit into "
                "feed-forward networks; allowed: prefix memories and adapters"
            )
        folds = form == "feed-forward" and (self.directory / "model" / CODE).exists()
        for option, value in (("--text", text), ("--slots", slots)):
            if value is not None and not folds:
                raise RunError(
                    f"{self.directory}: {option}: has an effect with --as feed-forward and slots alone"
                )
        if folds and text is None:
            raise RunError(
                f"{self.directory}: --as feed-forward: attention slots are distilled on public texts; name a "
                "file of them, one a line, with --text"
            )
        return folds

    def _write_folded(self, target: Path, text: Path, slots: int | None, *, check: bool) -> Path:
        """The run's prefix memory as a plain model with wider feed-forward networks."""
        from ..methods.prefix.fold import fold, read_texts, write_folded

        texts = read_texts(text)
        method, state = self.built()
        assert isinstance(method, WeightTuning)
        method.with_state(state)
        exact = self.recipe.model.model_copy(update={"quantization": None})
        recipe = self.recipe.model_copy(update={"model": exact})
        base = load_for(recipe, self.task, self.directory)
        with exact_weights(method.base.model, method.base.quantised):
            first = getattr(recipe.method, "first_layer", None) or 0
            folded = fold(base, method.trainable, texts, slots, recipe.seed, self.note, first)
        expected = reference(folded.trainable.model, base, chosen := some([]), method.tokens(chosen))

        def fill(folder: Path) -> None:
            write_folded(folded, base, folder)
            self._write_card(folder)
            if check and (said := check_export(folder, expected)):
                self.note(said)

        fill_folder(target, fill, last=("README.md", "config.json"))
        self.note(folded.cost)
        return target

    def _reference(self) -> Reference | None:
        """What an export is compared with: this run's model on rows of the test split; None where the run
        has no weights of its own, and for retrieval, whose encoder was compared when the run wrote it.

        Raises:
            ExportError: the model does not give the run's own predictions any more.
        """
        files = ("adapter_config.json", "config.json")
        has_weights = any((self.directory / "model" / name).exists() for name in files)
        if not has_weights or self.recipe.data.task == "retrieval":
            return None
        method, state = self.built()
        if not isinstance(method, ComparesExport):
            return None
        file, rows = self.directory / "predictions.jsonl", list[dict[str, Any]]()
        if file.exists():
            with file.open(encoding="utf-8") as lines:
                rows = [json.loads(line) for line in islice(lines, ROWS)]
        key = "text" if self.recipe.data.task == "classification" else "source"
        expected = method.reference(state, some([_predicted(row, key) for row in rows]))
        if self.recipe.model.quantization is not None:
            self.note(
                f"{self.recipe.model.base} is quantised in the run and exact in what is exported, so it was "
                "not checked whether it has changed since"
            )
        elif expected is not None and key == "text":
            for row, found in zip(rows, expected.rows, strict=False):
                self._check_prediction(row, found)
        return expected

    def _check_prediction(self, row: Mapping[str, Any], found: ReferenceRow) -> None:
        """Refuse to export where a base model that was changed since gives other predictions."""
        labels = self.task.labels
        share = float(softmax(found.output.double().numpy())[labels.index(row["prediction"])])
        allowed = 0.05 if self.recipe.model.dtype != "float32" else 0.002
        if abs(share - row["probability"]) > allowed:
            raise ExportError(
                f"{self.directory}: the model gives {row['prediction']!r} the probability {share:.3f} on the "
                f"first test rows, and gave {row['probability']:.3f} when the run ended; has "
                f"{self.recipe.model.base} changed since?{UNCHECKED}"
            )


def _predicted(row: Mapping[str, Any], key: str) -> Example:
    """The input of a line of ``predictions.jsonl``."""
    messages = tuple(Message(**message) for message in row.get("messages", ()))
    return Example(str(row[key]), label=0, messages=messages)
