"""The process of a site that stays: it holds the base model and the memory, and answers the engine's jobs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import traceback
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ...core.errors import FedcustomError, PolicyError, UpdateError, WireError
from ...core.files import read_json, write_json, write_tensors
from ...core.tensors import Tensors
from ...data.own import OwnData, read_own
from ...methods.tuning.head_messages import HEAD_GRADIENT, SCALE_HEAD
from ...recipe.recipe import Recipe, load_recipe
from ...transport import wire
from ...transport.channel import Packed
from ..nvflare.bridge import Bridge, BridgeError, BridgeListener
from .audit import AuditLog, digest
from .participant import Participant, refuse_retrieval_without_server
from .policy import check_labels, check_outgoing, check_recipe, check_round
from .settings import SiteSettings

Answer = tuple[dict[str, Any], Packed]

RUN_NAME = re.compile("[0-9a-f]{16}")

RUNS_KEPT = 3
"""Runs whose memory a site keeps on its disk."""


class Resident:
    """Answers messages about one run at a time.

    What leaves is decided here: the policy is applied and the log written before an answer is handed out. Of
    an unexpected failure only its kind is told; the rest is in this site's own ``errors.log``.
    """

    def __init__(self, name: str, settings: SiteSettings, where: Path, folder: Path) -> None:
        self.name, self.settings, self.where, self.folder = name, settings, where, folder
        self.audit = AuditLog(folder / "audit.jsonl")
        self.spool = folder / "spool"
        (self.spool / "passing").mkdir(parents=True, exist_ok=True)
        for left in [self.spool / "answer.safetensors", *self.spool.glob("passing/*.out")]:
            left.unlink(missing_ok=True)  # what came in is still to be answered
        self.run, self.open_run = "", ""
        self.recipe: Recipe | None = None
        self.own: OwnData | None = None
        self.participant: Participant | None = None
        self.loads = 0
        self.last: tuple[str, dict[str, Any]] = ("", {})
        self.audit.write("started", site=name, process=os.getpid())

    def serve(self, door: BridgeListener) -> None:
        """Answer one message after the other, for ever."""
        while True:
            bridge = door.accept()
            with contextlib.suppress(BridgeError):
                if (message := bridge.receive(timeout=10.0)) is not None:
                    self._answer_to(bridge, message)
            bridge.close()

    def _answer_to(self, bridge: Bridge, message: dict[str, Any]) -> None:
        asked = str(message.get("request", ""))
        if asked and asked == self.last[0]:  # the job ended before the answer got through
            answer = self.last[1]
        else:
            self._forget_last()
            answer = self.handle(message)
            self.last = (asked, answer)
        body = answer.get("body")
        if body is not None:  # the job's process removes what it has sent; the answer may be asked for again
            passing = self.spool / "passing" / f"{hashlib.sha256(os.urandom(16)).hexdigest()[:16]}.out"
            os.link(body, passing)
            answer = answer | {"body": str(passing)}
        bridge.send(answer)

    def _forget_last(self) -> None:
        body = self.last[1].get("body")
        if body is not None:
            Path(body).unlink(missing_ok=True)
        self.last = ("", {})

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message; what goes wrong is an answer too."""
        kind = str(message.get("kind"))
        try:
            values, packed = self._do(kind, message)
            return self._release(kind, message, values, packed)
        except PolicyError as error:
            self.audit.write("refused", run=self.run, kind=kind, reason=str(error))
            return {"refused": str(error)}
        except (UpdateError, WireError) as error:
            return self._failed(kind, error, str(error).splitlines()[0])
        except FedcustomError as error:  # its text may hold paths and contents of this site's files
            return self._failed(kind, error, f"{type(error).__name__}; the site's errors.log says more")
        except Exception as error:
            return self._failed(kind, error, type(error).__name__)

    def _failed(self, kind: str, error: Exception, reason: str) -> dict[str, Any]:
        """Tell that something failed; the details stay in ``errors.log``."""
        with (self.folder / "errors.log").open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc() + "\n")
        if not self.settings.policy.texts:
            reason = type(error).__name__
        self.audit.write("failed", run=self.run, kind=kind, told=reason)
        return {"error": reason}

    def _do(self, kind: str, message: dict[str, Any]) -> Answer:
        values, run = dict(message.get("values") or {}), str(message.get("run"))
        if not RUN_NAME.fullmatch(run):  # it becomes a part of a path
            self.run = ""
            raise WireError("a message names no run")
        if kind == "describe":
            return self._describe(run, values)
        if kind == "open":
            return self._open(run, values)
        participant = self._reopened(run)
        if "keep" in message:
            participant.memory.keep([int(number) for number in message["keep"]])
        tensors = _tensors(message.get("body"))
        if kind == "work":
            number = message.get("round")
            round_number = int(number) if number is not None else None
            check_round(self.settings.policy, self._answered(round_number), self._ledger().get("work", 0))
            packed = Packed(tensors, message.get("layout"))
            answer, said = participant.work(str(message["task"]), values, packed, round_number)
            return said, answer
        if kind == "evaluate":
            if not self.settings.policy.evaluate:
                raise PolicyError("policy.evaluate = false: this site does not tell how good a model is")
            refuse_retrieval_without_server(participant.recipe)
            found = participant.evaluate(str(message["part"]), tensors, values, int(message["after"]))
            return found, Packed({})
        raise WireError(f"a message of unknown kind {kind!r}")

    # --- opening ---

    def _describe(self, run: str, values: dict[str, Any]) -> Answer:
        """The recipe is checked against the policy, and this site's labels are told."""
        self.run, self.recipe, self.own = run, None, None
        recipe = self._allowed(values["recipe"])
        self.own = read_own(self.settings.data, self.where, recipe.data, recipe.public)
        self.recipe = recipe
        labels = self.own.label_values()
        check_labels(labels, named=self.settings.data.label is not None)
        return {"labels": labels, "rows": len(self.own.train)}, Packed({})

    def _open(self, run: str, values: dict[str, Any]) -> Answer:
        """Build the method; what is needed to do so again is kept on disk."""
        if self.recipe is None or self.own is None or run != self.run:
            raise WireError("a run is opened before it was described")
        names, labels = [str(n) for n in values["names"]], [str(label) for label in values["labels"]]
        if self.name not in names:
            raise WireError(f"the run's clients are {', '.join(names[:5])}; this site is {self.name}")
        self._build(self.recipe, self.own, names, labels)
        state = {"recipe": self.recipe.model_dump(mode="json"), "names": names, "labels": labels}
        write_json(self._folder / "run.json", state)
        self._remove_old_runs()
        assert self.participant is not None
        return {"sizes": self.participant.sizes()}, Packed({})

    def _reopened(self, run: str) -> Participant:
        """The run's participant; after a restart it is built again from what is on disk."""
        if self.participant is not None and run == self.open_run:
            self.run = run
            return self.participant
        file = self.folder / "runs" / run / "run.json"
        if not file.exists():
            raise WireError("the run is not open here")
        kept = read_json(file)
        recipe = self._allowed(kept["recipe"])
        self.run = run
        own = read_own(self.settings.data, self.where, recipe.data, recipe.public)
        return self._build(recipe, own, kept["names"], kept["labels"])

    def _allowed(self, content: dict[str, Any]) -> Recipe:
        """A recipe that this site takes part in. It is refused before a model is looked for, which completing
        it may do, and again once it is complete.
        """
        recipe = load_recipe(content)
        check_recipe(self.settings.policy, recipe)
        recipe = recipe.complete()
        check_recipe(self.settings.policy, recipe)
        return recipe

    def _build(self, recipe: Recipe, own: OwnData, names: list[str], labels: list[str]) -> Participant:
        self.participant, self.open_run = None, ""  # only one base model at a time
        self.participant = Participant(recipe, self.name, names, labels, own, self._folder, self._loaded)
        self.open_run = self.run
        return self.participant

    def _loaded(self) -> None:
        self.loads += 1
        self.audit.write("base model loaded", run=self.run, times=self.loads, process=os.getpid())

    @property
    def _folder(self) -> Path:
        return self.folder / "runs" / self.run

    def _remove_old_runs(self) -> None:
        runs = sorted((self.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in runs[:-RUNS_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)

    # --- leaving ---

    def _release(
        self, kind: str, message: dict[str, Any], values: dict[str, Any], packed: Packed
    ) -> dict[str, Any]:
        """Apply the policy to an answer, log it, and put its tensors into a file."""
        policy, ledger = self.settings.policy, self._ledger()
        size = packed.length(values)
        if kind == "describe":  # labels are texts that every classifier must agree on; they are few and short
            numbers = {key: value for key, value in values.items() if key != "labels"}
            check_outgoing(policy, kind, numbers, size, int(ledger.get("bytes", 0)))
        else:
            check_outgoing(policy, kind, values, size, int(ledger.get("bytes", 0)))
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        body: Path | None = None
        if packed.tensors:
            body = self.spool / "answer.safetensors"
            write_tensors(body, packed.tensors)
        facts: dict[str, Any] = {"run": self.run, "kind": kind, "bytes": size, "sha256": digest(text, body)}
        if kind == "work":
            facts |= {"task": message.get("task"), "round": message.get("round")}
        facts |= {"tensors": len(packed.tensors), "keys": sorted(values)}
        self.audit.write("sent", **facts)
        counts = kind == "work" and message.get("task") not in (SCALE_HEAD, HEAD_GRADIENT)
        self._spend(ledger, size, message.get("round"), counts)  # steps of a fit are bounded by the recipe
        answer: dict[str, Any] = {"values": values, "bytes": size}
        if packed.layout is not None:
            answer["layout"] = packed.layout
        return answer | ({"body": str(body)} if body else {})

    def _ledger(self) -> dict[str, Any]:
        """What has left in this run: bytes and rounds."""
        file = self._folder / "sent.json"
        found: dict[str, Any] = read_json(file) if file.exists() else {"bytes": 0, "rounds": []}
        return found

    def _spend(self, ledger: dict[str, Any], size: int, round_number: Any, work: bool) -> None:
        rounds = sorted({*ledger["rounds"], *([round_number] if round_number is not None else [])})
        spent = {"bytes": ledger["bytes"] + size, "rounds": rounds, "work": ledger.get("work", 0) + work}
        write_json(self._folder / "sent.json", spent)

    def _answered(self, but: int | None) -> int:
        """How many other rounds of this run have been answered."""
        return len([number for number in self._ledger()["rounds"] if number != but])


def _tensors(body: str | None) -> Tensors:
    if body is None:
        return {}
    try:
        tensors: Tensors = safetensors.torch.load_file(body)
    except FileNotFoundError:
        raise WireError("a message's tensors did not get through") from None
    except (SafetensorError, OSError) as error:
        raise WireError(f"a message is malformed: {str(error).splitlines()[0]}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in wire.DTYPES:
            raise WireError(f"{name}: {tensor.dtype} cannot travel")
    return tensors


def serve(name: str, settings: SiteSettings, where: Path, folder: Path) -> None:
    """Serve a site for ever. ``where`` is what the paths of its data are relative to, ``folder`` its own."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    resident = Resident(name, settings, where, folder)
    resident.serve(BridgeListener(folder / "bridge.json"))
