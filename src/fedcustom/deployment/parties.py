"""The parties of a deployed run: a method at the server, and sites that hold the data."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import RecipeError
from ..data.examples import ClientData, FederatedData, LearningTask
from ..data.own import OwnData, read_own
from ..federated.build import check_fit, make_method
from ..federated.simulation import Federation
from ..methods import AsksClients
from ..models.load import load_base
from ..models.park import park, parked
from ..recipe.recipe import Recipe
from ..transport.channel import Channel
from ..transport.protocol import check_visible
from .evaluation import RemoteEvaluation
from .nvflare.sites import Sites
from .remote import Remote
from .settings import FederationSettings

RUN_FILE = "run_id"


def run_name(directory: Path) -> str:
    """What sites know a run by: drawn when it begins, and kept in its directory from its first checkpoint on,
    so that it is the same whenever the run is resumed, wherever its directory is then.
    """
    file = directory / RUN_FILE
    return file.read_text(encoding="ascii").strip() if file.exists() else secrets.token_hex(8)


def check_deployable(recipe: Recipe) -> None:
    """Refuse what has a meaning in a simulation alone.

    Raises:
        RecipeError: names the setting.
    """
    if recipe.baseline != "federated":
        raise RecipeError(f"baseline = {recipe.baseline!r}: a deployed run is federated; leave it out")
    if recipe.evaluation.perturb:
        raise RecipeError("evaluation.perturb: is for simulations, whose server has the test texts")
    for section in ("attack", "noise", "participation"):
        value = getattr(recipe, section)
        if value != type(value)():
            raise RecipeError(f"[{section}]: is for simulations; real sites fail by themselves. Leave it out")


def gather(
    recipe: Recipe, settings: FederationSettings, folder: Path, sites: Sites, directory: Path
) -> Federation:
    """The parties of a deployed run, agreed on the recipe.

    Raises:
        RecipeError, DataError, ModelError: something does not fit: deployment, model, data.
        DeploymentError: too few sites take part.
    """
    check_deployable(recipe)
    check_fit(recipe)
    remote = Remote(recipe, settings, sites, run_name(directory), directory / RUN_FILE)
    own = read_own(settings.data, folder, recipe.data, recipe.public)
    remote.agree()
    data = _known(recipe, settings, own, remote.labels)
    base = load_base(recipe.model, data.task, recipe.seed, head=recipe.method.with_head)
    method = make_method(recipe, base, data, remote.transforms)
    remote.method = method
    check_visible(remote, remote.transforms, recipe.aggregation)
    origin, own_folder = method.initialise(), folder / "server" / "fedcustom"
    origin = replace(origin, tensors=parked(origin.tensors, own_folder))
    if base.device.type == "cpu":
        park(base.model, own_folder)  # the sites do the computing
    remote.channel = Channel(recipe.compression, origin.tensors)
    if isinstance(method, AsksClients):
        method.connect(remote.ask, list(data.clients))
    evaluation = RemoteEvaluation(remote, method, base, data)
    return Federation(base, data, method, origin, evaluation, remote, remote)


def _known(
    recipe: Recipe, settings: FederationSettings, own: OwnData, labels: Sequence[str]
) -> FederatedData:
    """What the server knows of the data: its own, and the sites' names."""
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
    task = LearningTask(recipe.data.task, tuple(labels))
    return FederatedData(task, clients, development, test, test_is_pooled=not test, public=own.public)
