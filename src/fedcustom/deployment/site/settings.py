"""Settings of a site (``site.toml``): its data, its policy, and its threads."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from ...core.errors import DeploymentError, PolicyError, nearest
from ...core.settings import Settings
from ...methods import registry
from .data import SiteDataSettings, check_declared
from .models import check_digests

S = TypeVar("S", bound=Settings)


class PolicySettings(Settings):
    """Policy of a site: what may leave. It wins over the recipe; what it forbids is refused and logged.

    What leaves is denied by kind of content unless it is chosen. A site that sets nothing takes part in
    training by updates and counts. Limits hold for the site, over all its runs.
    """

    methods: list[str] | None = Field(None, description="Methods that this site takes part in; unset: all")
    base_models: list[str] | None = Field(
        None,
        description="Models that this site loads, as name or, for one revision, name@revision; unset: any of "
        "the hub and the built-in ones that the recipe names, but no folder of this machine",
    )
    chat_templates: bool = Field(
        False,
        description="Whether a chat template that a recipe brings may be run here, in Jinja's sandbox; one "
        "that comes with the model always is",
    )
    model_digests: dict[str, str] = Field(
        default_factory=dict,
        description="SHA-256 of folders in base_models, [policy.model_digests] name = digest, as "
        "fedcustom site check prints it; a folder with another content is refused",
    )
    updates: bool = Field(True, description="Whether changes of trained tensors may leave")
    counts: bool = Field(True, description="Whether numbers of examples, losses and counts may leave")
    sums: bool = Field(
        False,
        description="Whether sums and gradients over vectors of texts may leave, as for fitting a head or "
        "learning routes",
    )
    logits: bool = Field(
        False, description="Whether predictions for given texts and scores of examples may leave"
    )
    vectors: bool = Field(
        False, description="Whether vectors of texts may leave, or scores of a search, which reveal them"
    )
    texts: bool = Field(
        False, description="Whether texts may leave: passages, answers, prompts, the wording of errors"
    )
    evaluate: bool = Field(
        True, description="Whether counts and sums of this site's own evaluation may leave"
    )
    least_examples: int = Field(
        10, ge=1, description="Fewest examples that an update, a sum or an evaluation may be computed from"
    )
    least_batch_size: int = Field(4, ge=1, description="Smallest batch that this site trains on")
    least_steps: int = Field(1, ge=1, description="Fewest optimiser steps in a round")
    least_label_examples: int = Field(
        5,
        ge=1,
        description="Fewest different texts of a label whose sums may leave; no text has more than one in so "
        "many of a sum or gradient: this site's own minimum of training.fit_head_least_texts. In secure sums "
        "it is the least that all sites together must have of a label for each time that one of this site's "
        "texts repeats",
    )
    least_label_examples_alone: int = Field(
        1,
        ge=1,
        description="With secure sums: the same of this site's own examples, whatever the others have and "
        "the server says; 1: what all sites have together decides",
    )
    max_top: int = Field(10, ge=1, description="Most documents that an answer to one query names")
    max_queries: int | None = Field(None, ge=0, description="Most queries of documents that are answered")
    max_queries_per_day: int = Field(1000, ge=0, description="The same in 24 hours")
    max_rounds: int | None = Field(
        None, ge=0, description="Most rounds that this site answers, over all runs"
    )
    max_rounds_per_day: int | None = Field(None, ge=0, description="The same in 24 hours")
    max_evaluations: int | None = Field(None, ge=0, description="Most evaluations, over all runs")
    max_evaluations_per_day: int | None = Field(None, ge=0, description="The same in 24 hours")
    max_runs_per_day: int = Field(100, ge=0, description="Most runs that are opened in 24 hours")
    max_message_megabytes: float | None = Field(None, gt=0, description="Largest message that may leave")
    max_total_megabytes: float | None = Field(
        None, gt=0, description="Most that may leave, all messages of all runs together"
    )
    max_megabytes_per_day: float | None = Field(None, gt=0, description="The same in 24 hours")
    max_request_gigabytes: float = Field(
        8.0, gt=0, le=64, description="Largest request that is received, and held on this site's disk"
    )
    max_task_seconds: float = Field(3600.0, gt=0, description="A task that takes longer is stopped")
    max_memory_gigabytes: float | None = Field(
        None,
        gt=0,
        description="Most memory of the resident process, base model and task together (Linux; not a GPU's)",
    )
    secure_sums: bool = Field(
        False,
        description="Whether this site takes part only in runs whose server is shown sums of the sites' "
        "changes alone (secure_sum.on = true in the recipe)",
    )
    least_sites: int = Field(3, ge=3, description="Fewest sites in a secure sum that this site helps to open")
    peers: list[str] = Field(
        default_factory=list,
        description="SHA-256 fingerprints of the sites' certificates, this one's included: no others are "
        "believed in secure sums; empty: all that the federation's authority has signed",
    )
    minimum_noise: float = Field(
        0.0,
        ge=0,
        description="Least noise over the bound of a release (z) with which this site trains, by the "
        "recipe's [privacy]; 0: none is needed",
    )
    least_unit: Literal["none", "example", "client"] = Field(
        "none",
        description="What a recipe's [privacy] must hide at least. example: each of this site's training "
        "rows, by noise that is made here; client: the site as a whole, by noise that the server may add, "
        "which then sees this site's changes without it (secure_sums = true: noise that is made here)",
    )
    max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Most that noised training here may spend, all steps of all runs together, at the least "
        "delta among them; what hides rows and what hides the whole site is counted apart, and training "
        "without noise of this site's own is refused",
    )


class SiteSettings(Settings):
    """Settings of one site: its file, commonly ``site.toml``."""

    threads: int | None = Field(None, ge=1, description="Processor threads to compute with; unset: all")
    data: SiteDataSettings = Field(default_factory=lambda: SiteDataSettings(), description="This site's data")
    policy: PolicySettings = Field(default_factory=lambda: PolicySettings(), description="What may leave")


def load_site(path: Path) -> SiteSettings:
    """Read and check a site's file.

    Raises:
        DeploymentError: it is missing, not TOML, or holds what is not allowed; names the key.
    """
    settings = load_settings(path, SiteSettings)
    for name in settings.policy.methods or []:
        if name not in registry.names():
            raise DeploymentError(
                f"{path}: policy.methods: unknown method {name!r}{nearest(name, registry.names())}"
            )
    try:
        check_declared(settings.data)
        check_digests(settings.policy.base_models or [], settings.policy.model_digests)
    except PolicyError as error:
        raise DeploymentError(f"{path}: {error}") from None
    return settings


def load_settings(path: Path, kind: type[S]) -> S:
    """Read and check a TOML file of some kind of settings.

    Raises:
        DeploymentError: it is missing, not TOML, or holds what is not allowed; names the key.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeploymentError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeploymentError(f"{path}: not TOML: {error}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            section: Any = kind
            for part in problem["loc"][:-1]:
                section = section.model_fields[str(part)].annotation
            known = list(section.model_fields)
            raise DeploymentError(
                f"{path}: unknown key {key}{nearest(str(problem['loc'][-1]), known)}"
            ) from None
        raise DeploymentError(f"{path}: {key} = {problem['input']!r}: {problem['msg']}") from None


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and help of every setting of a site's file."""
    for section, kind in (("", SiteSettings), ("data.", SiteDataSettings), ("policy.", PolicySettings)):
        for name, field in kind.model_fields.items():
            if name in ("data", "policy"):
                continue
            named = str(field.annotation).removeprefix("<class '").removesuffix("'>")
            default = field.get_default(call_default_factory=True)
            yield section + name, named, str(default), str(field.description)
