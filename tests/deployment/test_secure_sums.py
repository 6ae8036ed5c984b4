"""Secure sums among sites, without the engine: equal to the simulation to the last bit, whoever is lost, and
what a dishonest server gets.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fedcustom
from fedcustom.core.errors import DeploymentError, RunError, SecureSumError
from fedcustom.core.tensors import equal
from fedcustom.deployment import parties
from fedcustom.deployment.nvflare.identity import CertificateVerifier, KitSigner
from fedcustom.deployment.task_digest import task_digest
from helpers.secure_sites import Authority, SecureSites, failing, last, rows_of
from helpers.site_recipes import blocks, owners_recipe


@pytest.fixture
def recipe(tiny: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """Prefix-tuning in two rounds with four clients of unlike size."""
    return owners_recipe(
        tiny["bert"],
        tmp_path / "rows",
        blocks(30, 40, 24, 36),
        training={"batch_size": 8, "cohort_width": 1, "local_steps": 2},
        rounds={"count": 2},
        evaluation={"batch_size": 32},
        secure_sum={"on": True, "most_examples": 40},
    )


def test_a_deployed_run_is_equal_to_the_simulation_to_the_last_bit(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Also with a site that is lost after it has sent its masked vector: its change is in the sum."""
    fedcustom.run(recipe, out=str(tmp_path / "simulated"))
    sites = SecureSites(tmp_path / "sites", recipe, trick=failing("o2", "agree"))
    sites.run(tmp_path / "deployed")
    assert equal(last(tmp_path / "simulated"), last(tmp_path / "deployed"))
    one, other = rows_of(tmp_path / "simulated"), rows_of(tmp_path / "deployed")
    for mine, theirs in zip(one, other, strict=True):
        for key in ("answered", "train_loss", "examples", "left_out", "norms"):
            assert mine.get(key) == theirs.get(key), key
    assert one[-1]["answered"] == ["o0", "o1", "o2", "o3"]
    assert any(note == "o2 was lost after its change was summed: lost" for note in sites.notes)
    # What a site sends of its work is masked, and nothing else.
    works = [said for _, message, said in sites.seen if message["kind"] == "work"]
    for said in works:
        assert set(said["values"]) == {"message"}
        (name, tensor), *more = safetensors.torch.load_file(said["body"]).items()
        assert (name, tensor.dtype, more) == ("masked", torch.int32, [])
    # Of unmasked floats it differs by rounding, which two rounds of Adam magnify.
    fedcustom.run({**recipe, "secure_sum": None}, out=str(tmp_path / "plain"))
    for name, tensor in last(tmp_path / "plain").items():
        assert (tensor - last(tmp_path / "deployed")[name]).abs().max() < 1e-5


@pytest.mark.parametrize("stage", ["keys", "shares", "work"])
def test_a_site_that_is_lost_before_its_vector_is_left_out(
    recipe: dict[str, Any], tmp_path: Path, stage: str
) -> None:
    sites = SecureSites(tmp_path / "sites", {**recipe, "rounds": {"count": 1}}, trick=failing("o1", stage))
    sites.run(tmp_path / "out")
    row = rows_of(tmp_path / "out")[-1]
    assert (row["answered"], row["left_out"]) == (["o0", "o2", "o3"], {"o1": "lost"})
    assert row["examples"] == 3 * 2 * 8


def test_too_few_sites_end_the_round_with_the_reason(recipe: dict[str, Any], tmp_path: Path) -> None:
    def trick(name: str, message: dict[str, Any]) -> Any:
        return {"error": "lost"} if name in ("o0", "o1") and message["kind"] == "work" else None

    reason = r"0 of 4 clients answered.*2 sites have sent their vectors, 3 are needed"
    with pytest.raises(RunError, match=reason):
        SecureSites(tmp_path / "sites", recipe, trick=trick).run(tmp_path / "out")


def test_what_a_site_never_answers(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Plain tasks, tasks before their keys, requests out of turn, another round, a second sum of a round."""
    sites = SecureSites(tmp_path / "sites", {**recipe, "rounds": {"count": 1}})
    sites.run(tmp_path / "out")
    site = sites.sites["o0"]
    work = next(m for name, m, _ in sites.seen if name == "o0" and m["kind"] == "work")
    stages = {m["values"]["stage"]: m for name, m, _ in sites.seen if name == "o0" and m["kind"] == "secure"}
    body = next(m["body"] for _, m, _ in sites.seen if m["kind"] == "work")
    plain = {key: value for key, value in work.items() if key != "secure"}
    assert (
        "asks for secure sums, and the task is none of one" in site.handle({**plain, "body": body})["error"]
    )
    assert "before its keys and shares, or a second time" in site.handle(work)["error"]
    for stage in ("shares", "agree", "unmask"):
        assert "is over" in site.handle(stages[stage])["error"], "replayed"
    assert "lacks the keys" in [site.handle(stages[s]) for s in ("keys", "shares")][1]["error"]
    other = {**stages["shares"], "values": {**stages["shares"]["values"], "round": 2}}
    assert "no secure sum of round 2 is under way" in site.handle(other)["error"]
    for values in (
        {},
        {"stage": "work", "round": 1},
        {"stage": "keys", "round": 0},
        {"stage": "keys", "round": True},
    ):
        assert "names no exchange or no round" in site.handle({**other, "values": values})["error"]
    assert (
        "Roster of a secure sum"
        in site.handle({**other, "values": {"stage": "shares", "round": 1, "message": "{}"}})["error"]
    )
    assert "message" in site.handle(stages["keys"])["values"]
    assert (site.outgoing["kind"], site.outgoing["exchange"]) == ("secure", "keys"), "for the audit log"


def test_a_round_is_unmasked_once_even_after_a_restart(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sum again is allowed, as when a run is resumed; without one of its sites it is refused."""
    monkeypatch.setattr(parties, "run_id", lambda directory: "0123456789abcdef")
    sites = SecureSites(tmp_path / "sites", {**recipe, "rounds": {"count": 1}})
    sites.run(tmp_path / "out")
    for name in sites.names:
        sites.start(name)
    sites.run(tmp_path / "same")
    assert equal(last(tmp_path / "out"), last(tmp_path / "same"))
    sites.trick = failing("o3", "work")
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        sites.run(tmp_path / "fewer")
    assert "0 sites have revealed their shares, 3 are needed" in sites.notes[-1]
    assert "was unmasked before for other sites or another task" in sites.seen_by("o0")[-1]
    noted = json.loads(
        (sites.folder / "o0" / "fedcustom" / "secure_sums" / "0123456789abcdef.json").read_text()
    )
    assert {key: entry["sites"] for key, entry in noted.items()} == {"1.1": sites.names}


def test_a_run_that_was_stopped_while_a_sum_was_opened_goes_on_with_the_same_sites(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """In round 2 one site is lost early, and another one after some have unmasked: too few shares."""
    sites = SecureSites(tmp_path / "sites", recipe)
    early, late = failing("o3", "work", 2), failing("o1", "unmask", 2)
    sites.trick = lambda name, message: early(name, message) or late(name, message)
    with pytest.raises(RunError, match="0 of 4 clients answered"):
        sites.run(tmp_path / "out")
    sites.trick = None
    sites.run(tmp_path / "out", resume=True)
    row = rows_of(tmp_path / "out")[-1]
    assert (row["round"], row["answered"]) == (2, ["o0", "o1", "o2"])
    assert row["left_out"] == {"o3": "round 2 was begun with other sites, whose sum may have been opened"}


@pytest.mark.parametrize(
    ("others", "reason", "unmasked"),
    [
        (["o3"], "the sum of 4 sites has the weight|the sum of the clients' changes is malformed", True),
        (["o2", "o3"], "2 sites have signed the survivors, 3 are needed", False),
    ],
)
def test_sites_that_were_sent_another_model(
    recipe: dict[str, Any],
    tmp_path: Path,
    others: list[str],
    reason: str,
    unmasked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server also forges their receipts, so that its own check passes. Masks with them do not cancel."""
    for side in ("site", "server"):  # as if it had forged the digest of whose vector it is, too
        monkeypatch.setattr(
            f"fedcustom.privacy.secure_sum.{side}.vector_digest", lambda work, name: b"v" * 32
        )
    sites = SecureSites(tmp_path / "sites", {**recipe, "rounds": {"count": 1}})
    receipts: list[str] = []

    def trick(name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        if message["kind"] != "work":
            return None
        if name in others:
            tensors = safetensors.torch.load_file(message["body"])
            other = {key: tensor + 1 for key, tensor in tensors.items()}
            safetensors.torch.save_file(other, message["body"])
        said = sites.sites[name].handle(message)
        receipts.append(said["values"]["message"])
        said["values"]["message"] = receipts[0]
        return said

    sites.trick = trick
    with pytest.raises(RunError, match="0 of 4 clients answered") as caught:
        sites.run(tmp_path / "out")
    assert re.search(reason, " ".join([str(caught.value), *sites.notes]))
    assert len(set(receipts)) == 2
    assert (sites.folder / "o0" / "fedcustom" / "secure_sums").exists() == unmasked


def test_policies(recipe: dict[str, Any], tmp_path: Path) -> None:
    sites = SecureSites(tmp_path / "a", {**recipe, "secure_sum": None}, policy={"secure_sums": True})
    with pytest.raises(DeploymentError, match=r"policy.secure_sums = true: .*secure_sum.on = true"):
        sites.run(tmp_path / "out-a")
    sites = SecureSites(tmp_path / "b", recipe, policy={"secure_sums": True, "least_sites": 5})
    with pytest.raises(RunError, match="a secure sum of 4 sites: at least 5 are needed"):
        sites.run(tmp_path / "out-b")
    sites = SecureSites(tmp_path / "c", {**recipe, "rounds": {"count": 1}})
    known = [CertificateVerifier.of(sites.folder / n / "startup") for n in sites.names]
    assert all(one.excluded == {"localhost", "fedcustom"} for one in known)
    pins = [fingerprint_of(sites.folder / name) for name in sites.names]
    for name in sites.names:
        sites.start(name, peers=["SHA256:" + pin.upper() for pin in pins])
    sites.run(tmp_path / "out-c")
    sites.start("o0", peers=pins[:3])
    sites.trick = failing("o1", "shares")
    with pytest.raises(RunError, match=r"2 sites have shared their secrets, 3 are needed"):
        sites.run(tmp_path / "out-d")
    assert "o3: its certificate is not among policy.peers" in sites.seen_by("o0")[-1]


def fingerprint_of(kit: Path) -> str:
    import hashlib

    return hashlib.sha256(KitSigner(kit).credential).hexdigest()


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_certificates(tmp_path: Path, kind: str) -> None:
    authority, stranger = Authority(), Authority()
    kit = authority.kit(tmp_path / "north", "north", kind=kind)
    signer, known = KitSigner(kit), CertificateVerifier.of(kit / "startup")
    signature = signer.sign(b"said")
    known.verify("north", signer.credential, b"said", signature)

    def refused(name: str, credential: bytes, message: bytes, signature: bytes, reason: str) -> None:
        with pytest.raises(SecureSumError, match=reason):
            known.verify(name, credential, message, signature)

    refused("north", signer.credential, b"other", signature, "north: its signature is forged")
    refused("north", signer.credential, b"said", b"", "north: its signature is forged")
    refused("south", signer.credential, b"said", signature, "south: signs with the certificate of another")
    refused("north", b"nothing", b"said", signature, "not the federation's")
    for name, maker, more, reason in (
        ("north", stranger, {}, "not the federation's"),
        ("north", authority, {"days": (-9, -1)}, "not valid now"),
        ("north", authority, {"days": (1, 9)}, "not valid now"),
        ("localhost", authority, {}, "no site's"),
        ("admin@x.org", authority, {}, "no site's"),
    ):
        other = KitSigner(maker.kit(tmp_path / "other", name, kind=kind, **more))  # type: ignore[arg-type]
        refused(name, other.credential, b"said", other.sign(b"said"), reason)
    with pytest.raises(DeploymentError, match="its key or certificate cannot be read"):
        KitSigner(tmp_path)
    with pytest.raises(DeploymentError, match="the authority's certificate cannot be read"):
        CertificateVerifier.of(tmp_path)


def test_the_digest_of_a_task_depends_on_all_of_it() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
    said: tuple[Any, ...] = ("train", {"steps": 2, "round": 1}, None, 1, tensors)
    others: list[tuple[Any, ...]] = [
        ("fit head", *said[1:]),
        (said[0], {"steps": 3, "round": 1}, *said[2:]),
        (*said[:2], [0], *said[3:]),
        (*said[:3], 2, said[4]),
        (*said[:4], {**tensors, "a": tensors["a"] + 1e-7}),
        (*said[:4], {**tensors, "a": tensors["a"].reshape(3, 2)}),
        (*said[:4], {"c": tensors["a"], "b": tensors["b"]}),
        (*said[:4], {"a": tensors["a"], "b": torch.tensor(1.0, dtype=torch.float64)}),
    ]
    assert len({task_digest(*one) for one in [said, *others]}) == len(others) + 1
    again = {"b": tensors["b"].clone(), "a": tensors["a"].t().contiguous().t()}
    assert task_digest(*said[:4], again) == task_digest(*said)
