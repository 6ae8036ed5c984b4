"""A finished run, read from its directory: its summary and history, its model, and what the model answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import DataError, RunError
from ..core.files import read_json
from ..data.examples import Example, LearningTask
from ..data.inputs import input_example
from ..data.settings import MESSAGES
from ..data.truncation import EXCHANGES, CutCount
from ..evaluation.calibration import softmax
from ..exporting.hub import check_repository, push, refuse_local_names
from ..exporting.run_export import RunExport
from ..federated.base_model import load_for
from ..federated.build import make_method
from ..federated.history_frames import client_frame, round_frame
from ..federated.resolve import resolved
from ..federated.run_directory import History
from ..federated.truncation import count_parts
from ..methods import CountsCuts, Method, State, WeightTuning, WritesTexts
from ..methods.prefix.memory_export import FILE as CODE
from ..methods.tuning.peft_support import leave_out_virtual_tokens
from ..models.configuration import context_length
from ..models.load import Base
from ..models.writing import Decoding, Written, write
from ..recipe.recipe import Recipe, read_toml, recorded_recipe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ChatReply:
    """An answer in a conversation.

    Attributes:
        text: what the model wrote, without surrounding space.
        ended: whether the model ended its turn, and was not stopped by ``evaluation.max_new_tokens``.
        dropped: tokens of the oldest exchanges, which the model was not given for want of room.
    """

    text: str
    ended: bool
    dropped: int


@dataclass(frozen=True)
class Prompt:
    """What a run's model is to go on from.

    Attributes:
        model: the customised model.
        base: the base model that it is made of, with its tokenizer.
        ids: token ids, without those of virtual tokens.
        cut: tokens of the input that are left out, since it is longer than ``data.max_length``.
        room: the longest text in tokens for which the model has positions; None where they are not bounded.
        stop: texts before which what is written ends.
    """

    model: Any
    base: Base
    ids: list[int]
    cut: int
    room: int | None
    stop: tuple[str, ...] = ()


class Run:
    """A finished run, read from its directory.

    Raises:
        RunError: the directory holds no finished run.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "recipe.toml").exists():
            raise RunError(f"{self.directory}: holds no run (no recipe.toml)")
        if not (self.directory / "summary.json").exists():
            raise RunError(f"{self.directory}: the run is not finished; go on with fedcustom run --resume")
        self.recipe: Recipe = recorded_recipe(self.directory / "recipe.toml")
        self.summary: dict[str, Any] = read_json(self.directory / "summary.json")
        if "pooling" not in read_toml(self.directory / "recipe.toml").get("model", {}):
            self._refuse_unpooled()

    def _refuse_unpooled(self) -> None:
        """A classifier from before ``model.pooling`` read another vector than one that is built now."""
        if resolved(self.recipe).model != self.recipe.model:
            raise RunError(
                f"{self.directory}: was made before classifiers pooled their encoder's states "
                "(model.pooling); run its recipe again"
            )

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in self.summary["metrics"].items())
        return f"Run({str(self.directory)!r}: {self.summary['baseline']} {self.summary['method']}, {metrics})"

    @property
    def history(self) -> pd.DataFrame:
        """One row a round, and as many columns for a thousand clients as for two: ``round``; how many clients
        were asked (``cohort``), ``answered``, were ``left_out`` and were ``late``; ``bytes_up`` and
        ``bytes_down`` of all of them together, and the running totals of both. Nested figures have dotted
        names, such as ``development.accuracy`` and ``seconds.train``.

        Raises:
            RunError: a line of ``metrics.jsonl`` is not JSON.
        """
        return round_frame(History.read(self.directory / "metrics.jsonl").rows)

    @property
    def client_history(self) -> pd.DataFrame:
        """One row for each client that was asked in a round: ``round``, ``client``, ``bytes_up`` and
        ``bytes_down`` (0 in a run that sends nothing), ``answered`` (whether its answer was merged),
        ``left_out`` (the reason; missing for an answer that was merged), ``late`` (rounds by which its start
        was behind the newest, 0 for one on time), and of trained changes that were merged ``norm``
        (Euclidean, over all tensors) and ``steps``.

        Raises:
            RunError: a line of ``metrics.jsonl`` is not JSON.
        """
        return client_frame(History.read(self.directory / "metrics.jsonl").rows)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        self._require_model()
        if (self.directory / "model" / CODE).exists():  # whose loading would run the folder's code
            return self._base.tokenizer
        return AutoTokenizer.from_pretrained(self.directory / "model")

    def model(self) -> Any:
        """The customised model: a ``PeftModel``, a ``transformers`` model where a method exports it whole, or
        the base model where a method leaves its weights as they are. No code of the run's folder is read.

        Raises:
            RunError: the run has one model for each client (a local baseline).
        """
        self._require_model()
        if (self.directory / "model" / CODE).exists():  # built here: the folder's own code is not run
            method, state = self._method
            assert isinstance(method, WeightTuning)
            return method.with_state(state).eval()
        folder = str(self.directory / "model")
        if (self.directory / "model" / "adapter_config.json").exists():
            from peft import PeftModel

            base = load_for(self.recipe, self._task, self.directory)
            adapter = read_json(self.directory / "model" / "adapter_config.json")
            if adapter["peft_type"] == "PROMPT_TUNING":
                leave_out_virtual_tokens(base.model, adapter["num_virtual_tokens"])
            return PeftModel.from_pretrained(base.model, folder).eval()
        recipe = self.recipe
        if (self.directory / "model" / "config.json").exists():  # else the method leaves the weights alone
            whole = {"base": folder, "revision": None, "quantization": None}
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=whole)})
        return load_for(recipe, self._task, self.directory).model

    def predict(self, inputs: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the customised model says of new inputs: texts, or rows with the recipe's columns. For
        conversations a text is a user's turn, and an answer at the end of a row's ``messages`` is left out.

        Returns one dict an input: ``label``, ``probability`` and ``probabilities`` for a classifier, ``text``
        for a generator.

        Raises:
            DataError: an input lacks a column that the recipe's template names, or the cell is empty or no
                plain value, as in training; names the input.
        """
        if not inputs:
            return []
        method, state = self._method
        writes, examples = self.recipe.data.writes, self._examples(inputs)
        said = method.predict(state, examples, texts=True)
        if writes:
            return [{"text": text} for text in said.texts or []]
        shares = softmax(said.scores)
        labels = self._task.labels
        return [
            {
                "label": labels[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": {label: float(share) for label, share in zip(labels, row, strict=True)},
            }
            for row in shares
        ]

    def count_cuts(self, inputs: Sequence[str | Mapping[str, Any]]) -> CutCount:
        """How many of new inputs are longer than ``data.max_length`` and are cut in :meth:`predict`, and how
        many tokens of each column.

        Raises:
            DataError: see :meth:`predict`.
        """
        examples, base = self._examples(inputs), self._base
        return count_parts(self.recipe, self.recipe.data, base, {"public": [("", examples)]})["public"]

    def take_cuts(self) -> list[str]:
        """What else :meth:`predict` has cut or left out since the last call, such as demonstrations for which
        a prompt had no room: a sentence on each.
        """
        method, _ = self._method
        return method.take_cuts() if isinstance(method, CountsCuts) else []

    @property
    def converses(self) -> bool:
        """Whether the model answers conversations (:meth:`check_chat` says why not). Loads it."""
        try:
            self.check_chat()
        except RunError:
            return False
        return True

    def load_model(self) -> None:
        """Load the model now, and not when it is first asked.

        Raises:
            RunError: the run has one model for each client.
        """
        _ = self._method

    def check_chat(self) -> None:
        """Refuse a run whose model answers no conversations.

        Raises:
            RunError: the run was made neither on conversations nor on preferences, or on these without a
                template of conversations, or has one model for each client.
        """
        if (task := self.recipe.data.task) not in ("chat", "preference"):
            raise RunError(
                f"{self.directory}: was not made on conversations (data.task = {task!r}); its model answers "
                "fedcustom predict"
            )
        self._require_model()
        if self._base.chat is None:
            raise RunError(
                f"{self.directory}: its model has no chat template, so that it learnt from plain texts; it "
                "answers fedcustom predict"
            )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        on_text: Callable[[str], None] = lambda text: None,
    ) -> ChatReply:
        """The answer to a conversation, whose last message is a user's. What does not fit in
        ``data.max_length`` tokens is left out, whole exchanges, the oldest first.

        Args:
            messages: dicts with ``role`` and ``content``.
            on_text: is told of each piece of the answer as it is written (of a beam search, of all at once).

        Raises:
            RunError: the run was not made on conversations, or has one model for each client.
            DataError: messages are malformed, or the model's chat template takes no such conversation.
        """
        self.check_chat()
        data, row = self.recipe.data, {MESSAGES: list(messages)}
        last = row[MESSAGES][-1] if row[MESSAGES] else None
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            raise DataError("the last message is the assistant's: there is nothing to answer")
        method, state = self._method
        template = self._base.chat
        assert isinstance(method, WritesTexts)
        assert template is not None
        example = input_example(data.model_copy(update={"messages": MESSAGES}), row, 0)
        (asked,) = template.encode([example], data, self._base.token_rules)
        found = method.prompts(state, [example])
        how = Decoding.of(self.recipe.evaluation)
        said = write(found.model, found.base, found.sources[0], how, on_text)
        return ChatReply(said.text, said.ended, asked.lost.get(EXCHANGES, 0))

    def prompt(self, asked: str | Mapping[str, Any]) -> Prompt:
        """The prompt of one input of :meth:`predict`, for :meth:`write`. It holds until the next call of
        another method of this run that uses the model.

        Raises:
            RunError: the run's model writes no texts.
            DataError: see :meth:`predict`.
        """
        method, state = self._method
        if not self.recipe.data.writes or not isinstance(method, WritesTexts):
            raise RunError(f"{self.directory}: its model writes no texts (data.task, method.name)")
        examples = self._examples([asked])
        found = method.prompts(state, examples)
        base, (ids,) = found.base, found.sources
        cut = count_parts(self.recipe, self.recipe.data, self._base, {"public": [("", examples)]})["public"]
        room = context_length(base.model.config)
        if room is not None:
            own = self.recipe.method.context_tokens + (0 if base.sequence_to_sequence else len(ids))
            room -= own
        return Prompt(found.model, base, ids, sum(cut.tokens.values()), room, found.stop)

    def write(
        self,
        prompt: Prompt,
        how: Decoding | None = None,
        on_text: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Written:
        """The text that the model writes after a prompt. Without ``how`` it is that of :meth:`predict`.

        Args:
            prompt: of :meth:`prompt`.
            how: the longest text, beams or a temperature, texts to stop at.
            on_text: is told of each piece of the text as it is written (of a beam search, of all at once).
            stopped: is asked after each token whether to end.
        """
        how = how or Decoding.of(self.recipe.evaluation)
        how = replace(how, stop=(*how.stop, *prompt.stop))
        return write(prompt.model, prompt.base, prompt.ids, how, on_text, stopped)

    def _examples(self, inputs: Sequence[str | Mapping[str, Any]]) -> list[Example]:
        return [input_example(self.recipe.data, item, number) for number, item in enumerate(inputs)]

    def export(
        self,
        to: str | Path,
        *,
        form: Literal["model", "feed-forward"] = "model",
        text: str | Path | None = None,
        slots: int | None = None,
        merge: bool = False,
        check: bool = True,
        note: Callable[[str], None] = lambda text: None,
    ) -> Path:
        """Copy the model to a folder, from which ``peft`` or ``transformers`` load it without this package.
        An adapter of a base model that is a part of this package takes that along, as ``base/`` (14 MB at
        most). The copy is loaded in a fresh process, and its outputs are compared with this run's model,
        unless ``check`` is False; ``note`` is told where that is left out.

        Args:
            to: A folder that does not exist, or is empty: a mount point, a link to a folder and ``.`` too.
            form: ``feed-forward``: a plain model with wider feed-forward networks, without code of its own.
                That of a prefix memory is distilled on public texts; ``note`` is told what that costs.
            text: A file of unlabelled texts, one a line, for that.
            slots: Units in each network of it; unset: such that it has as many numbers.
            merge: Add an adapter (LoRA, IA3) to the base model's weights, for a plain model in float32.

        Raises:
            RunError: the run has no single model, the folder is not empty or lies in the model's own, the
                copy gives other outputs, or the run's method has no such form.
        """
        self._require_model()
        exporting = RunExport(self.directory, self.recipe, self._task, lambda: self._method, note)
        return exporting.write(Path(to), form, text, slots, check=check, merge=merge)

    def push_to_hub(
        self,
        folder: str | Path,
        repository: str,
        *,
        public: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Upload a folder that :meth:`export` wrote to a repository of the hub, a private one by default. The
        token is that of ``hf auth login``. Returns the repository's address.

        Raises:
            RunError: the name is no repository's, a file names a folder of this machine, or the hub refuses.
        """
        check_repository(repository)
        refuse_local_names(Path(folder), self.recipe.model.base)
        return push(Path(folder), repository, public=public, note=note)

    def _require_model(self) -> None:
        if not (self.directory / "model").is_dir():
            raise RunError(f"{self.directory}: there is one model for each client, and so none to load")

    @property
    def _task(self) -> LearningTask:
        return LearningTask.of(self.recipe.data, tuple(self.summary["labels"]))

    @cached_property
    def _base(self) -> Base:
        return load_for(self.recipe, self._task, self.directory)

    @cached_property
    def _method(self) -> tuple[Method, State]:
        """The method, with the state that it finished with."""
        self._require_model()
        method = make_method(self.recipe, self._base)
        return method, method.open(self.directory / "model")
