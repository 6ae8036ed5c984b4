"""A site with its own key in a deployed run: it joins, is revoked, and stays out while the others go on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from fedcustom.deployment.nvflare import authority, requests
from fedcustom.deployment.nvflare.certificates import colons, read_certificate
from fedcustom.deployment.run import serving
from fedcustom.deployment.settings import load_federation
from helpers.deployed import Watcher, bed, metrics
from helpers.keys import key_bodies, knock, wait_for_port, where_key_is

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]


def test_a_site_with_its_own_key_joins_and_is_revoked(
    tiny: dict[str, str], data_folder: Path, tmp_path: Path
) -> None:
    recipe = {
        "model": {"base": tiny["bert"]},
        "data": {"source": str(data_folder), "max_length": 24},
        "clients": {"partition": "iid", "count": 3},
        "method": {"name": "prefix", "length": 4},
        "training": {"batch_size": 8, "local_steps": 2},
        "rounds": {"count": 7},
    }
    with bed(tmp_path / "f", recipe, start=False) as made:
        made.patience(start_with=2)
        *others, name = made.names
        kit, folder = made.kit(name), made.folder
        # The key that was made centrally is withdrawn; from here on the site's key is its own.
        shutil.copytree(kit / "startup", tmp_path / "central")
        authority.revoke(folder, name)
        for part in ("startup", "local"):
            shutil.rmtree(kit / part)
        file, key = requests.make_request(kit, name)
        pids: dict[str, list[int]] = {}
        revoked_at: list[float] = []

        def join() -> None:
            pids.update({other: made.engine(other) for other in others} | {"server": made.server()})
            signed = tmp_path / f"{name}.signed.zip"
            authority.sign(folder, file, signed, fingerprint=colons(key))
            requests.install(kit, signed)
            made.start_and_wait(name)

        def revoke() -> None:
            authority.revoke(folder, name)
            revoked_at.append(time.monotonic())

        made.start(*others)
        watcher = Watcher({1: join, 4: revoke})
        made.run(tmp_path / "run", watcher)
        rows = {row["round"]: row for row in metrics(tmp_path / "run")}
        answered = [set(rows[number]["answered"]) for number in range(1, 8)]
        print(watcher.notes, answered)
        assert answered[0] == set(others)
        assert answered[3] == {*others, name}, "it joined in the second round, or the third"
        assert answered[4] == answered[5] == answered[6] == set(others)
        assert any(f"{name}: revoked or removed" in note for note in watcher.notes)
        print(f"the next round ended {watcher.times[5] - revoked_at[0]:.1f} s after the revocation")
        assert watcher.times[5] - revoked_at[0] < 60
        assert pids == {other: made.engine(other) for other in others} | {"server": pids["server"]}, (
            "nobody had to restart"
        )
        (body,) = key_bodies(kit)
        assert where_key_is(body, tmp_path) == [kit / "startup" / "client.key"]

        settings = load_federation(folder)
        root = kit / "startup" / "rootCA.pem"
        with serving(folder, settings, print):
            wait_for_port(settings.port)
            good = made.kit(others[0]) / "startup"
            assert knock(settings.port, root, good / "client.crt", good / "client.key") == "let in"
            for old in (kit / "startup", tmp_path / "central"):
                said = knock(settings.port, root, old / "client.crt", old / "client.key")
                assert said != "let in", "signed by the authority, and revoked"
        assert read_certificate(kit / "startup" / "client.crt").name == name
        assert name not in (made.folder / "server" / "access.json").read_text()
