"""Resident process of a site: holds base model and memory, and answers requests from the engine's jobs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import FedcustomError, PolicyError, UpdateError, WireError
from ...core.files import write_tensors
from ...core.tensors import Tensors
from ...core.text import printable
from ...methods import Task, TrainingTask
from ...privacy.secure_sum.messages import write_message
from ...transport import gate, wire
from ...transport.channel import Packed
from ..nvflare.bridge import Bridge, BridgeError, BridgeListener
from ..task_digest import task_digest
from .audit import LONGEST_TEXT, AuditLog, digest
from .ledger import Ledger
from .limits import CANCEL_FILE, TaskStopped, limit_memory, stoppable
from .opening import Openings
from .participant import Participant, refuse_retrieval_without_server
from .policy import (
    MAX_ATTEMPTS,
    check_content,
    check_evaluation,
    check_outgoing,
    check_work,
)
from .privacy import check_spending, check_turn, releases_of, turn_of
from .request import Request, read_request
from .rows import DataChanged
from .secure_sums import MASKED, MESSAGE, Identify, SecureSums, kit_identity, no_identity
from .settings import SiteSettings

Result = tuple[dict[str, Any], Packed]
"""Values and tensors of a reply, before the policy has been applied to it."""


class Resident:
    """Resident service of a site: answers requests, about one run at a time.

    A request is checked against the site's policy and counted in its ledger before it is executed; its reply
    is checked and logged before it leaves. Of an unexpected failure only its kind is told; the rest is in
    this site's own ``errors.log``.

    ``base`` is the folder that paths of the data are relative to, ``folder`` the one for this site's files.
    ``own_process``: a task that cannot be stopped otherwise ends this process. ``data_changed``: whether a
    run goes on whose rows here are not those that it began with. ``identify`` gives the site's key for secure
    sums.

    Raises:
        DeploymentError: the ledger is damaged.
    """

    def __init__(
        self,
        name: str,
        settings: SiteSettings,
        base: Path,
        folder: Path,
        *,
        own_process: bool = False,
        data_changed: DataChanged = "refuse",
        identify: Identify = no_identity,
    ) -> None:
        self.identify = identify
        self.secure_sums: SecureSums | None = None
        self.name, self.settings, self.folder = name, settings, folder
        self.own_process = own_process
        self.audit = AuditLog(folder / "audit.jsonl")
        self.ledger = Ledger(folder / "ledger.json")
        self.runs = Openings(name, settings, base, folder, self.audit, self.ledger, data_changed)
        self.spool = folder / "spool"
        (self.spool / "passing").mkdir(parents=True, exist_ok=True)
        for stale in [self.spool / "answer.safetensors", *self.spool.glob("passing/*.out")]:
            stale.unlink(missing_ok=True)  # requests (*.in) stay: they have yet to be answered
        self.run_id = ""  # of this request
        self.last_reply: tuple[str, dict[str, Any]] = ("", {})  # with the request's identifier
        self.outgoing: dict[str, Any] = {}  # what the audit log says of the last reply when it is sent
        self.audit.write("started", site=name, process=os.getpid())

    def serve(self, listener: BridgeListener) -> None:
        """Answer one request after the other, for ever."""
        while True:
            bridge = listener.accept()
            with contextlib.suppress(BridgeError):
                try:
                    message = bridge.receive(timeout=10.0)
                except RecursionError:  # JSON of more levels than can be read
                    self.audit.write("failed", told="RecursionError")
                    bridge.send({"error": "RecursionError"})
                else:
                    if message is not None:
                        self.answer(bridge, message)
            bridge.close()

    def answer(self, bridge: Bridge, message: dict[str, Any]) -> None:
        """Send the reply to one request. The audit log says "sent" when all is done that can fail but the
        hand-over itself, and "not sent" where that fails.
        """
        request = str(message.get("request", ""))
        again = bool(request) and request == self.last_reply[0]  # the job ended before the reply got through
        if not again:
            self._delete_last_reply()
            self.last_reply = (request, self.handle(message))
        reply = self.last_reply[1]
        body = reply.get("body")
        if body is not None:  # the job's process deletes what it has sent; the reply may be asked for again
            link = self.spool / "passing" / f"{hashlib.sha256(os.urandom(16)).hexdigest()[:16]}.out"
            os.link(body, link)
            reply = reply | {"body": str(link)}
        if self.outgoing:
            self.audit.write("sent", **self.outgoing, **({"again": True} if again else {}))
        try:
            bridge.send(reply)
        except BridgeError:
            if self.outgoing:
                self.audit.write("not sent", sha256=self.outgoing["sha256"], reason="the job has ended")
            raise

    def _delete_last_reply(self) -> None:
        body = self.last_reply[1].get("body")
        if body is not None:
            Path(body).unlink(missing_ok=True)
        self.last_reply = ("", {})

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request; a refusal or a failure is a reply too, whatever the message holds."""
        self.outgoing, self.run_id, kind = {}, "", _told(str(message.get("kind")), 40)
        try:
            return self._reply(read_request(message))
        except PolicyError as error:
            reason = _told(str(error))
            self.audit.write("refused", run=self.run_id, kind=kind, reason=reason)
            return {"refused": reason}
        except (UpdateError, WireError) as error:
            return self._failed(kind, error, (str(error).splitlines() or [""])[0])
        except FedcustomError as error:  # its text may hold paths and contents of this site's files
            return self._failed(kind, error, f"{type(error).__name__}; the site's errors.log says more")
        except Exception as error:
            return self._failed(kind, error, type(error).__name__)

    def _failed(self, kind: str, error: Exception, reason: str) -> dict[str, Any]:
        """Tell that something failed; the details stay in ``errors.log``."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        with (self.folder / "errors.log").open("a", encoding="utf-8") as file:
            file.write("\n".join(_told(line) for line in lines) + "\n\n")
        told = self.settings.policy.texts or isinstance(error, WireError)  # which speaks of the message alone
        reason = _told(reason) if told else type(error).__name__
        self.audit.write("failed", run=self.run_id, kind=kind, told=reason)
        return {"error": reason}

    def _reply(self, request: Request) -> dict[str, Any]:
        """Execute one request within the site's limits; what it did is counted whatever comes of it."""
        self.run_id, sent = request.run, 0
        opening = self.runs.record(request.run)
        if request.kind in ("work", "evaluate") and opening.exists():
            request = replace(request, opening=digest("", opening))
        if self.ledger.attempts(request.digest) >= MAX_ATTEMPTS:
            raise PolicyError(f"the request has ended this site's process {MAX_ATTEMPTS} times")
        self.ledger.begin(request.run, request.digest)
        seconds, cancel = self.settings.policy.max_task_seconds, self.folder / CANCEL_FILE
        try:
            with stoppable(seconds, cancel, own_process=self.own_process):
                values, packed = self._execute(request)
                reply, facts = self._released(request, values, packed)
            sent = int(reply["bytes"])
        except TaskStopped:
            self.runs.close()  # it is built again from what is on disk
            raise
        finally:
            self.ledger.finish(request.run, request.digest, sent)
        self.outgoing = facts
        return reply

    def _execute(self, request: Request) -> Result:
        if request.kind == "describe":
            return self.runs.describe(request.run, request.values.get("recipe")), Packed({})
        if request.kind == "open":
            return self.runs.open(request.run, request.values), Packed({})
        participant = self.runs.participant_of(request.run)
        if request.kind == "secure":
            return self._secure_sums(participant).answer(request.values), Packed({})
        asked = participant.task(request.task, request.values) if request.kind == "work" else None
        if request.keep is not None:
            participant.memory.prune(request.keep)
        tensors = _tensors(request.body)
        if asked is not None:
            return self._work(participant, request, asked, tensors)
        return self._evaluate(participant, request, tensors)

    def _work(self, participant: Participant, request: Request, asked: Task, tensors: Tensors) -> Result:
        """Check a task, count it, and execute it."""
        asked = replace(asked, tensors=tensors)
        participant.check_task(asked, request.round)
        begins = request.round is not None and not asked.continues
        secure = self._secure_work(participant, request, asked)
        queries, policy = asked.queries_asked, self.settings.policy
        check_work(policy, self.ledger, participant.settled, request, begins=begins, queries=queries)
        mechanism, wanted = participant.mechanism, participant.releases(asked)
        if mechanism is not None and wanted:
            check_spending(policy, self.ledger, request.run, mechanism, wanted)
            for release in releases_of(mechanism, wanted):
                self.ledger.note_release(request.run, release)
        if participant.hidden is not None and isinstance(asked, TrainingTask):
            check_turn(policy, self.ledger, request.run, participant.hidden)
            self.ledger.note_release(request.run, turn_of(participant.hidden))
        if begins:
            self.ledger.note_round(request.run, request.digest)
        counted = not queries and not asked.continues
        self.ledger.add(request.run, tasks=int(counted), queries=queries)
        packed, withheld = Packed(tensors, request.layout), participant.withheld
        if asked.exact_answer and begins and withheld.examples:
            facts = {"labels": withheld.labels, "examples": withheld.examples}
            self.audit.write("withheld", run=self.run_id, kind=request.task, **facts)
        if secure is not None:
            assert request.round is not None
            assert request.secure is not None
            digest = task_digest(request.task, request.values, request.layout, request.round, tensors)
            numbers, task = participant.change(
                asked, packed, request.round, secure.needed(request.round, asked.place), digest
            )
            masked = secure.mask(request.round, request.secure, task, numbers, asked.place)
            values = {MESSAGE: write_message(masked.receipt).decode()}
            signed = np.int32 if masked.numbers.itemsize == 4 else np.int64
            update = Packed({MASKED: torch.from_numpy(masked.numbers.view(signed))})
        else:
            update, values = participant.execute(asked, packed, request.round)
        self.runs.log_cuts(request.run, participant.take_cuts())
        return values, update

    def _secure_sums(self, participant: Participant) -> SecureSums:
        """This site's part in the run's secure sums.

        Raises:
            WireError: the run's recipe asks for none.
        """
        settings = participant.recipe.secure_sum
        if settings is None or not settings.on:
            raise WireError("the run's recipe asks for no secure sums")
        if self.secure_sums is None or self.secure_sums.run != self.run_id:
            names, terms = participant.names, settings.terms(self.settings.policy.least_sites)
            folder = self.folder / "secure_sums"
            self.secure_sums = SecureSums(self.name, self.run_id, names, terms, self.identify, folder)
        return self.secure_sums

    def _secure_work(self, participant: Participant, request: Request, asked: Task) -> SecureSums | None:
        """What masks the answer to a task; None where it is sent as it is.

        Raises:
            WireError: a task of a run with secure sums came without them, or the other way round.
        """
        settings = participant.recipe.secure_sum
        on = settings is not None and settings.on
        if on != (request.secure is not None) or (on and request.round is None):
            raise WireError(
                "a task came with shares of a secure sum, of which the run's recipe knows nothing"
                if not on
                else "the run's recipe asks for secure sums, and the task is none of one"
            )
        if not on or request.round is None:
            return None
        found = self._secure_sums(participant)
        found.expect_work(request.round, asked.place)
        return found

    def _evaluate(self, participant: Participant, request: Request, tensors: Tensors) -> Result:
        """Check an evaluation, count it, and make it."""
        assert request.part is not None
        check_content(self.settings.policy, ["counts"], "an evaluation")
        check_evaluation(self.settings.policy, self.ledger, participant.settled, request)
        refuse_retrieval_without_server(participant.recipe)
        participant.check_state(tensors, request.values)
        self.ledger.note_evaluation(request.run, request.part, request.digest)
        self.ledger.add(request.run)
        found = participant.evaluate(request.part, tensors, request.values, request.after)
        self.runs.log_cuts(request.run, participant.take_cuts())
        return found.to_values(), Packed({})

    @property
    def participant(self) -> Participant | None:
        """This site in the run that was opened last."""
        return self.runs.participant

    # --- replies ---

    def _released(
        self, request: Request, values: dict[str, Any], packed: Packed
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reply, once the policy allows it, its tensors in a file; and what the audit log says of it."""
        policy, size, kind = self.settings.policy, packed.length(values), request.kind
        # Labels are texts, but this site's file declares them, and all must agree on them.
        # Messages of secure sums are keys, shares and signatures.
        secure = kind == "secure" or request.secure is not None
        free = {"labels"} if kind == "describe" else {MESSAGE} if secure else set()
        checked = {key: value for key, value in values.items() if key not in free}
        check_outgoing(policy, kind, checked, size, self.ledger)
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
            facts |= {"task": request.task, "round": request.round}
        if kind == "secure":
            facts |= {"exchange": request.values.get("stage"), "round": request.values.get("round")}
        if kind == "evaluate":
            facts |= {"part": request.part, "after": request.after}
        facts |= {"tensors": len(packed.tensors), "keys": sorted(values)}
        reply: dict[str, Any] = {"values": values, "bytes": size}
        if packed.layout is not None:
            reply["layout"] = packed.layout
        return reply | ({"body": str(body)} if body else {}), facts


def _told(text: str, longest: int = LONGEST_TEXT) -> str:
    """A text as it may stand in a log or an answer: one line of printable characters, cut."""
    return printable(text, lines=False, longest=longest)


def _tensors(body: Path | None) -> Tensors:
    return {} if body is None else gate.read_tensor_file(body, wire.MAX_BYTES)


def serve(
    name: str, settings: SiteSettings, base: Path, folder: Path, data_changed: DataChanged = "refuse"
) -> None:
    """Serve a site for ever, in a process of its own; see :class:`Resident`."""
    limit_memory(settings.policy.max_memory_gigabytes)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    identify = kit_identity(folder.parent, settings.policy.peers)
    resident = Resident(
        name, settings, base, folder, own_process=True, data_changed=data_changed, identify=identify
    )
    resident.serve(BridgeListener(folder / "bridge.json"))
