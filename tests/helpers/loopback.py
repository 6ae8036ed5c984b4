"""A federation without the engine: requests of the server's messenger go to sites in this process.

All else is a deployed run's own code: kits, policies, the gate, messages in files, the run's directory.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from fedcustom.deployment.nvflare.job_channel import JobChannel, ReceivedMessage
from fedcustom.deployment.nvflare.messenger import Messenger, Timeouts
from fedcustom.deployment.parties import check_deployable, gather
from fedcustom.deployment.settings import load_federation
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.secure_sums import kit_identity
from fedcustom.deployment.site.settings import load_site
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run import run_recipe
from fedcustom.recipe.recipe import load_recipe
from helpers.deployed import Bed


class Loopback:
    """What a messenger needs of a job's channel, with sites that answer one after the other."""

    def __init__(self, made: Bed, names: Iterable[str]) -> None:
        self.residents = dict[str, Resident]()
        for name in names:
            file = made.kit(name) / "data" / "site.toml"
            identify = kit_identity(made.kit(name), ())
            self.residents[name] = Resident(
                name, load_site(file), file.parent, made.own(name), identify=identify
            )
        self.sites, self.job_number = frozenset(self.residents), 1
        self.answers = deque[ReceivedMessage]()
        self.number = 0

    def members(self) -> frozenset[str]:
        return self.sites

    def connected(self) -> frozenset[str]:
        return self.sites

    def start(self, expected: Collection[str], deadline: float) -> None:
        """The one job is always there."""

    def restart(self) -> None:
        """As above."""

    def send(self, site: str, head: str, body: Path | None, reply_path: Path, max_bytes: int) -> int:
        """Have the site answer at once; its reply waits to be received."""
        self.number += 1
        message, resident = json.loads(head), self.residents[site]
        request = resident.spool / "passing" / f"{secrets.token_hex(8)}.in"
        message["body"] = str(shutil.copyfile(body, request)) if body else None
        reply = dict(resident.handle(message))
        request.unlink(missing_ok=True)
        sent = reply.pop("body", None)
        if sent is not None:
            shutil.copyfile(sent, reply_path)
            assert reply_path.stat().st_size <= max_bytes
        values = json.loads(json.dumps(reply))
        self.answers.append(ReceivedMessage(self.number, site, values, reply_path if sent else None, ""))
        return self.number

    def cancel(self, number: int) -> None:
        """Nothing is late."""

    def receive(self, timeout: float) -> ReceivedMessage | None:
        return self.answers.popleft() if self.answers else None

    def close(self) -> None:
        """Nothing is open."""


def run_in_loopback(made: Bed, out: Path, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Run the bed's recipe with its sites, none of which has been started."""
    settings = load_federation(made.folder)
    recipe = resolved(load_recipe(made.recipe))
    check_deployable(recipe)
    channel = cast(JobChannel, Loopback(made, made.names))
    spool = made.folder / "server" / "loopback"
    messenger = Messenger(channel, spool, Timeouts(120.0, 5.0, 120.0), 10**9, lambda _: None)
    try:
        return run_recipe(
            recipe, out, resume=False, callbacks=list(callbacks),
            gather=lambda recipe, directory, *_: gather(recipe, settings, made.folder, messenger, directory),
        )  # fmt: skip
    finally:
        messenger.close()
