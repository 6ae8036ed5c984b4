"""Resident process of a site: holds base model and memory, and answers requests from the engine's jobs."""

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
from ...data.party_data import OwnData, read_own
from ...federated.resolve import resolved
from ...methods.tuning.head_messages import HEAD_GRADIENT, SCALE_HEAD
from ...recipe.recipe import Recipe, load_recipe
from ...transport import wire
from ...transport.channel import Packed
from ..nvflare.bridge import Bridge, BridgeError, BridgeListener
from ..replies import LabelList, as_part
from .audit import AuditLog, digest
from .participant import Participant, refuse_retrieval_without_server
from .policy import check_labels, check_outgoing, check_recipe, check_round
from .settings import SiteSettings

Result = tuple[dict[str, Any], Packed]
"""Values and tensors of a reply, before the policy has been applied to it."""

RUN_ID = re.compile("[0-9a-f]{16}")

MAX_STORED_RUNS = 3
"""Runs whose memory stays on a site's disk."""


class Resident:
    """Resident service of a site: answers requests, about one run at a time.

    The policy is applied and the audit log written before a reply leaves. Of an unexpected failure only its
    kind is told; the rest is in this site's own ``errors.log``.

    ``base`` is the folder that paths of the data are relative to, ``folder`` the one for this site's files.
    """

    def __init__(self, name: str, settings: SiteSettings, base: Path, folder: Path) -> None:
        self.name, self.settings, self.base, self.folder = name, settings, base, folder
        self.audit = AuditLog(folder / "audit.jsonl")
        self.spool = folder / "spool"
        (self.spool / "passing").mkdir(parents=True, exist_ok=True)
        for stale in [self.spool / "answer.safetensors", *self.spool.glob("passing/*.out")]:
            stale.unlink(missing_ok=True)  # requests (*.in) stay: they have yet to be answered
        self.run_id, self.open_run_id = "", ""
        self.recipe: Recipe | None = None
        self.data: OwnData | None = None
        self.participant: Participant | None = None
        self.load_count = 0
        self.last_reply: tuple[str, dict[str, Any]] = ("", {})  # with the request's identifier
        self.audit.write("started", site=name, process=os.getpid())

    def serve(self, listener: BridgeListener) -> None:
        """Answer one request after the other, for ever."""
        while True:
            bridge = listener.accept()
            with contextlib.suppress(BridgeError):
                if (message := bridge.receive(timeout=10.0)) is not None:
                    self._answer(bridge, message)
            bridge.close()

    def _answer(self, bridge: Bridge, message: dict[str, Any]) -> None:
        request = str(message.get("request", ""))
        if request and request == self.last_reply[0]:  # the job ended before the reply got through
            reply = self.last_reply[1]
        else:
            self._delete_last_reply()
            reply = self.handle(message)
            self.last_reply = (request, reply)
        body = reply.get("body")
        if body is not None:  # the job's process deletes what it has sent; the reply may be asked for again
            link = self.spool / "passing" / f"{hashlib.sha256(os.urandom(16)).hexdigest()[:16]}.out"
            os.link(body, link)
            reply = reply | {"body": str(link)}
        bridge.send(reply)

    def _delete_last_reply(self) -> None:
        body = self.last_reply[1].get("body")
        if body is not None:
            Path(body).unlink(missing_ok=True)
        self.last_reply = ("", {})

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request; a refusal or a failure is a reply too."""
        kind = str(message.get("kind"))
        try:
            values, packed = self._execute(kind, message)
            return self._released(kind, message, values, packed)
        except PolicyError as error:
            self.audit.write("refused", run=self.run_id, kind=kind, reason=str(error))
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
        self.audit.write("failed", run=self.run_id, kind=kind, told=reason)
        return {"error": reason}

    def _execute(self, kind: str, message: dict[str, Any]) -> Result:
        values, run_id = message.get("values") or {}, str(message.get("run"))
        if not isinstance(values, dict):
            raise WireError("a message's values must be a JSON object")
        if not RUN_ID.fullmatch(run_id):  # it becomes a part of a path
            self.run_id = ""
            raise WireError("a message names no run")
        if kind == "describe":
            return self._describe(run_id, values)
        if kind == "open":
            return self._open(run_id, values)
        participant = self._participant_of(run_id)
        task = participant.task(message.get("task"), values) if kind == "work" else None
        if "keep" in message:
            participant.memory.prune([int(number) for number in message["keep"]])
        tensors = _tensors(message.get("body"))
        if task is not None:
            number = message.get("round")
            round_number = int(number) if number is not None else None
            tasks = self._usage().get("work", 0)
            check_round(self.settings.policy, self._other_rounds(round_number), tasks)
            packed = Packed(tensors, message.get("layout"))
            update, update_values = participant.execute(task, packed, round_number)
            return update_values, update
        if kind == "evaluate":
            if not self.settings.policy.evaluate:
                raise PolicyError("policy.evaluate = false: this site does not tell how good a model is")
            refuse_retrieval_without_server(participant.recipe)
            part, after = as_part(message["part"]), int(message["after"])
            return participant.evaluate(part, tensors, values, after).to_values(), Packed({})
        raise WireError(f"a message of unknown kind {kind!r}")

    # --- opening ---

    def _describe(self, run_id: str, values: dict[str, Any]) -> Result:
        """Check the recipe against the policy, and reply with the labels of this site's data."""
        self.run_id, self.recipe, self.data = run_id, None, None
        recipe = self._checked_recipe(values["recipe"])
        self.data = read_own(self.settings.data, self.base, recipe.data, recipe.public)
        self.recipe = recipe
        labels = self.data.label_values()
        check_labels(labels, named=self.settings.data.label is not None)
        return LabelList(labels, len(self.data.train)).to_values(), Packed({})

    def _open(self, run_id: str, values: dict[str, Any]) -> Result:
        """Build the method, and save what is needed to do so again."""
        if self.recipe is None or self.data is None or run_id != self.run_id:
            raise WireError("a run is opened before it was described")
        names, labels = [str(n) for n in values["names"]], [str(label) for label in values["labels"]]
        if self.name not in names:
            raise WireError(f"the run's clients are {', '.join(names[:5])}; this site is {self.name}")
        participant = self._build(self.recipe, self.data, names, labels)
        state = {"recipe": self.recipe.model_dump(mode="json"), "names": names, "labels": labels}
        write_json(self._run_folder / "run.json", state)
        self._remove_old_runs()
        return participant.sizes().to_values(), Packed({})

    def _participant_of(self, run_id: str) -> Participant:
        """The participant of a run; after a restart it is built again from what is on disk."""
        if self.participant is not None and run_id == self.open_run_id:
            self.run_id = run_id
            return self.participant
        file = self.folder / "runs" / run_id / "run.json"
        if not file.exists():
            raise WireError("the run is not open here")
        saved = read_json(file)
        recipe = self._checked_recipe(saved["recipe"])
        self.run_id = run_id
        data = read_own(self.settings.data, self.base, recipe.data, recipe.public)
        return self._build(recipe, data, saved["names"], saved["labels"])

    def _checked_recipe(self, content: dict[str, Any]) -> Recipe:
        """A recipe that the policy allows. It is checked before it is completed, which may look up its model,
        and again afterwards.
        """
        recipe = load_recipe(content)
        check_recipe(self.settings.policy, recipe)
        recipe = resolved(recipe)
        check_recipe(self.settings.policy, recipe)
        return recipe

    def _build(self, recipe: Recipe, data: OwnData, names: list[str], labels: list[str]) -> Participant:
        self.participant, self.open_run_id = None, ""  # only one base model at a time
        participant = Participant(recipe, self.name, names, labels, data, self._run_folder, self._log_load)
        self.participant, self.open_run_id = participant, self.run_id
        return participant

    def _log_load(self) -> None:
        self.load_count += 1
        self.audit.write("base model loaded", run=self.run_id, times=self.load_count, process=os.getpid())

    @property
    def _run_folder(self) -> Path:
        return self.folder / "runs" / self.run_id

    def _remove_old_runs(self) -> None:
        runs = sorted((self.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in runs[:-MAX_STORED_RUNS]:
            shutil.rmtree(folder, ignore_errors=True)

    # --- replies ---

    def _released(
        self, kind: str, message: dict[str, Any], values: dict[str, Any], packed: Packed
    ) -> dict[str, Any]:
        """The reply, once the policy allows it and the audit log holds it; its tensors are in a file."""
        policy, usage = self.settings.policy, self._usage()
        size = packed.length(values)
        if kind == "describe":  # labels are texts, but few and short, and all must agree on them
            numbers = {key: value for key, value in values.items() if key != "labels"}
            check_outgoing(policy, kind, numbers, size, int(usage.get("bytes", 0)))
        else:
            check_outgoing(policy, kind, values, size, int(usage.get("bytes", 0)))
        text = json.dumps(values, sort_keys=True, ensure_ascii=False)
        body: Path | None = None
        if packed.tensors:
            body = self.spool / "answer.safetensors"
            write_tensors(body, packed.tensors)
        facts: dict[str, Any] = {
            "run": self.run_id,
            "kind": kind,
            "bytes": size,
            "sha256": digest(text, body),
        }
        if kind == "work":
            facts |= {"task": message.get("task"), "round": message.get("round")}
        facts |= {"tensors": len(packed.tensors), "keys": sorted(values)}
        self.audit.write("sent", **facts)
        # Steps of a fit of the head do not count as tasks: the recipe bounds them.
        is_task = kind == "work" and message.get("task") not in (SCALE_HEAD, HEAD_GRADIENT)
        self._record_usage(usage, size, message.get("round"), is_task)
        reply: dict[str, Any] = {"values": values, "bytes": size}
        if packed.layout is not None:
            reply["layout"] = packed.layout
        return reply | ({"body": str(body)} if body else {})

    def _usage(self) -> dict[str, Any]:
        """What the policy limits in this run: bytes that have left, rounds and tasks that were answered."""
        file = self._run_folder / "sent.json"
        usage: dict[str, Any] = read_json(file) if file.exists() else {"bytes": 0, "rounds": []}
        return usage

    def _record_usage(self, usage: dict[str, Any], size: int, round_number: Any, work: bool) -> None:
        rounds = sorted({*usage["rounds"], *([round_number] if round_number is not None else [])})
        updated = {"bytes": usage["bytes"] + size, "rounds": rounds, "work": usage.get("work", 0) + work}
        write_json(self._run_folder / "sent.json", updated)

    def _other_rounds(self, round_number: int | None) -> int:
        """How many other rounds of this run have been answered."""
        return len([number for number in self._usage()["rounds"] if number != round_number])


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


def serve(name: str, settings: SiteSettings, base: Path, folder: Path) -> None:
    """Serve a site for ever; see :class:`Resident`."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    resident = Resident(name, settings, base, folder)
    resident.serve(BridgeListener(folder / "bridge.json"))
