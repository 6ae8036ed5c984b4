"""Settings of a federation (``federation.toml``): its sites, its server, and how long the server waits."""

from __future__ import annotations

from pathlib import Path

import tomli_w
from pydantic import Field

from ..core.errors import DeploymentError
from ..core.files import write_text
from ..core.settings import Settings
from ..data.party_data import OwnDataSettings
from .site.settings import load_settings

FILE = "federation.toml"


class FederationSettings(Settings):
    """``federation.toml`` in a federation's folder."""

    server: str = Field(..., description="The server's host name, as sites reach it")
    port: int = Field(8002, ge=1, le=65535, description="The server's one port")
    sites: list[str] = Field(..., min_length=1, description="Names of the sites, in the clients' order")
    start_with: int | None = Field(
        None, ge=1, description="Sites that must be there for a run to begin; unset: rounds.min_clients"
    )
    round_seconds: float = Field(
        3600.0, gt=0, description="After this long a round closes without the sites that have not answered"
    )
    grace_seconds: float = Field(
        60.0, ge=0, description="How long a round waits for a site that has gone, while enough others answer"
    )
    quorum_seconds: float = Field(
        3600.0, gt=0, description="How long to wait until rounds.min_clients sites are there"
    )
    max_message_megabytes: float = Field(
        4096.0, gt=0, description="Largest answer that the server takes from a site"
    )
    data: OwnDataSettings = Field(
        default_factory=lambda: OwnDataSettings(),
        description="The server's own development, test and public data, if it has any",
    )


def load_federation(folder: Path) -> FederationSettings:
    """Read a federation's file.

    Raises:
        DeploymentError: the folder holds no federation, or its file is not in order.
    """
    if not (folder / FILE).exists():
        raise DeploymentError(
            f"{folder}: holds no federation (no {FILE}); make one with fedcustom deploy init"
        )
    return load_settings(folder / FILE, FederationSettings)


def save_federation(folder: Path, settings: FederationSettings) -> None:
    """Write a federation's file."""
    content = settings.model_dump(exclude_none=True)
    write_text(folder / FILE, tomli_w.dumps(content))
