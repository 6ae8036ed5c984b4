"""Parties of a deployed run: the method at the server, and the sites that hold the data."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import RecipeError
from ..data.examples import ClientData, Example, FederatedData, LearningTask
from ..data.party_data import OwnData, read_own
from ..federated.base_model import load_for
from ..federated.build import check_fit, make_method, noised_sums, summation
from ..federated.example_run import ExampleRun, check_rows, example_privacy
from ..federated.fingerprint import of_server
from ..federated.private_run import private_run
from ..federated.simulation import Federation
from ..federated.truncation import fitted_data
from ..models.memory_mapping import park, parked
from ..recipe.recipe import Recipe
from ..transport.channel import Channel
from ..transport.protocol import Transport, check_visible
from ..updates.pipeline import update_transforms
from .connection import SiteConnection
from .evaluation import RemoteEvaluation
from .memories import RemoteMemories
from .nvflare.messenger import Messenger
from .participants import agree
from .settings import FederationSettings
from .transport import RemoteTransport

RUN_FILE = "run_id"

OPENING_FILE = "secure_sum.json"
"""File in the run's directory: of which sites a sum was opened last."""


def run_id(directory: Path) -> str:
    """A run's identifier at the sites: drawn when it begins, and kept in its directory from its first
    checkpoint on, so that it is the same whenever the run is resumed, even if its directory was moved.
    """
    file = directory / RUN_FILE
    return file.read_text(encoding="ascii").strip() if file.exists() else secrets.token_hex(8)


def check_deployable(recipe: Recipe) -> None:
    """Refuse settings that have a meaning in a simulation only.

    Raises:
        RecipeError: names the setting.
    """
    if recipe.baseline != "federated":
        raise RecipeError(f"baseline = {recipe.baseline!r}: a deployed run is federated; leave it out")
    if recipe.workers is not None and recipe.workers.count is not None:
        raise RecipeError("[workers]: is for simulations; sites have their own processes. Leave it out")
    if recipe.evaluation.perturb:
        raise RecipeError("evaluation.perturb: is for simulations, whose server has the test texts")
    for section in ("attack", "noise", "participation"):
        value = getattr(recipe, section)
        if value != type(value)():
            raise RecipeError(f"[{section}]: is for simulations; real sites fail by themselves. Leave it out")


def check_generation(recipe: Recipe, test: Sequence[Example]) -> None:
    """Refuse a limit on the texts of the server's own ``test`` rows where it has none.

    Raises:
        RecipeError: says what to set instead.
    """
    if recipe.evaluation.generate_limit is not None and not test:
        raise RecipeError(
            "evaluation.generate_limit: counts the server's own test rows, and it has none: name some in "
            "federation.toml (data.test), or set evaluation.generate = false"
        )


def check_private(recipe: Recipe, development: Sequence[Example]) -> None:
    """Refuse a run that hides its clients where the sites would evaluate each state, for they would get it
    before its checkpoint is on the disk: a run that is resumed would release another with the same noise.

    Raises:
        RecipeError: says what to set instead.
    """
    if recipe.client_privacy is not None and recipe.client_privacy.place == "server" and not development:
        raise RecipeError(
            "privacy.unit = 'client': the server needs development data of its own, or sites would see "
            "states before these are checkpointed; name some in federation.toml (data.development)"
        )
    hidden = recipe.privacy is not None and recipe.privacy.unit != "none"
    if hidden and not development and (recipe.evaluation.select != "last" or recipe.evaluation.calibrate):
        assert recipe.privacy is not None
        raise RecipeError(
            f"privacy.unit = {recipe.privacy.unit!r}: without development data of the server's own the "
            "sites' would choose and scale the model; name some in federation.toml (data.development), or "
            "set evaluation.select = 'last' and evaluation.calibrate = false"
        )


def gather(
    recipe: Recipe, settings: FederationSettings, folder: Path, messenger: Messenger, directory: Path
) -> Federation:
    """Agree on the recipe with the sites, and put the run's parties together.

    ``folder`` is the federation's, ``directory`` the run's.

    Raises:
        RecipeError, DataError, ModelError: recipe, data and model do not fit together, or cannot be deployed.
        DeploymentError: too few sites take part.
    """
    check_deployable(recipe)
    check_fit(recipe)
    identifier = run_id(directory)
    connection = SiteConnection(messenger, identifier)
    own = read_own(settings.data, folder, recipe.data, recipe.public)
    min_clients = min(recipe.rounds.min_clients, len(settings.sites))
    participants = agree(connection, recipe, settings.sites, settings.start_with or min_clients)
    data = _server_view(recipe, settings, own, participants.labels)
    check_generation(recipe, data.test)
    check_private(recipe, data.development)
    check_rows(recipe, data)
    count = len(data.clients)
    private = private_run(recipe.settled(count), count, directory, with_sites=True)
    base = load_for(recipe, data.task, directory)
    data, truncation = fitted_data(recipe, recipe.data, base, data)
    transforms = update_transforms(recipe.compression)
    noise = (private.release, private.own_noise) if private is not None else (None, None)
    method = make_method(recipe, base, data, transforms, *noise)
    origin, parking = method.initialise(), folder / "server" / "fedcustom"
    origin = replace(origin, tensors=parked(origin.tensors, parking))
    if base.device.type == "cpu":
        park(base.model, parking)  # the sites do the computing
    channel = Channel(recipe.compression, origin.tensors)
    memories = RemoteMemories(directory / RUN_FILE, identifier)
    remote = RemoteTransport(method, channel, transforms, connection, participants, memories, min_clients)
    transport: Transport = remote
    mechanism = private.mechanism if private is not None else None
    summed = summation(recipe, method, count, lambda: noised_sums(method, mechanism, None))
    if summed is not None:
        from .nvflare.identity import CertificateVerifier
        from .secure_transport import SecureTransport

        verifier = CertificateVerifier.of(folder / "server" / "startup")
        transport = SecureTransport(remote, summed, verifier, directory / OPENING_FILE)
    check_visible(transport, transforms, recipe.aggregation)
    evaluation = RemoteEvaluation(recipe, method, base, data, connection, participants, memories)
    rows = of_server(data)
    rows_hidden = example_privacy(recipe, None)
    hidden = ExampleRun(rows_hidden) if rows_hidden is not None else None
    return Federation(
        base, data, method, origin, evaluation, transport, memories, rows, truncation, private, hidden
    )


def _server_view(
    recipe: Recipe, settings: FederationSettings, own: OwnData, labels: Sequence[str]
) -> FederatedData:
    """The data as the server knows them: its own, and the names of the sites."""
    for key in ("clients_per_round", "min_clients"):
        asked = getattr(recipe.rounds, key)
        if asked is not None and asked > len(settings.sites):
            raise RecipeError(f"rounds.{key} = {asked}: there are {len(settings.sites)} sites")
    development, test = own.examples("development", labels), own.examples("test", labels)
    if recipe.aggregation.rule == "fltrust" and not development:
        raise RecipeError(
            "aggregation.rule = 'fltrust': the server needs development data of its own; name it in "
            "federation.toml (data.development)"
        )
    if recipe.data.task == "retrieval" and not (development and test):
        raise RecipeError(
            "data.task = 'retrieval': the server must bring the questions; name them in federation.toml "
            "(data.development, data.test)"
        )
    clients = {name: ClientData(name, []) for name in settings.sites}
    task = LearningTask.of(recipe.data, labels)
    return FederatedData(task, clients, development, test, test_is_pooled=not test, public=own.public)
