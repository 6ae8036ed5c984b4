"""Settings of a site (``site.toml``): its data, its policy, and its threads."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from ...core.errors import DeploymentError, nearest
from ...core.settings import Settings
from ...data.party_data import OwnDataSettings
from ...methods import registry

S = TypeVar("S", bound=Settings)


class PolicySettings(Settings):
    """Policy of a site: what may leave. It wins over the recipe; what it forbids is refused and logged."""

    methods: list[str] | None = Field(None, description="Methods that this site takes part in; unset: all")
    base_models: list[str] | None = Field(
        None,
        description="Base models that this site loads, as name or, for one revision, name@revision; unset: "
        "any that the recipe names",
    )
    texts: bool = Field(
        True, description="Whether messages may hold texts (passages, answers, prompts); false: numbers alone"
    )
    evaluate: bool = Field(
        True, description="Whether counts and sums of this site's own evaluation may leave"
    )
    max_rounds: int | None = Field(None, ge=0, description="Rounds of one run that this site answers at most")
    max_message_megabytes: float | None = Field(None, gt=0, description="Largest message that may leave")
    max_total_megabytes: float | None = Field(
        None, gt=0, description="Most that may leave in one run, all messages together"
    )
    minimum_noise: float = Field(
        0.0,
        ge=0,
        description="Least multiplier of privacy noise that a recipe must ask for; 0: none is needed",
    )


class SiteSettings(Settings):
    """Settings of one site: its file, commonly ``site.toml``."""

    threads: int | None = Field(None, ge=1, description="Processor threads to compute with; unset: all")
    data: OwnDataSettings = Field(default_factory=lambda: OwnDataSettings(), description="This site's data")
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
    for section, kind in (("", SiteSettings), ("data.", OwnDataSettings), ("policy.", PolicySettings)):
        for name, field in kind.model_fields.items():
            if field.default_factory is not None:
                continue
            named = str(field.annotation).removeprefix("<class '").removesuffix("'>")
            yield section + name, named, str(field.default), str(field.description)
