"""Uploads of exported models to the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.library_errors import in_one_line

MESSAGE = "A model customised with fedcustom"
TEXTS = (".json", ".md", ".jinja", ".py", ".txt")
"""Endings of files that may name a folder of this machine."""


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository on the hub.

    Raises:
        RunError: says what is allowed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RunError(f"--push-to-hub: {in_one_line(error)}") from None


def refuse_local_names(folder: Path, base: str) -> None:
    """Refuse to publish a folder whose texts name the base model's folder on this machine.

    Raises:
        RunError: names the file, and what to do.
    """
    place = Path(base).expanduser()
    if base.startswith("builtin:") or not place.is_absolute():
        return
    for file in sorted(folder.rglob("*")):
        if file.suffix in TEXTS and str(place) in file.read_text(encoding="utf-8", errors="replace"):
            raise RunError(
                f"--push-to-hub: {file.relative_to(folder)} names the base model's folder on this machine, "
                "which others cannot load; --merge takes its weights along"
            )


def push(folder: Path, repository: str, *, public: bool, note: Callable[[str], None]) -> str:
    """Upload an exported folder to a model repository, which is made private if it is new. The token is the
    one that the library has from its own login.

    Discloses: the model, its card with the run's metrics and, of an encoder for retrieval, its router.

    Args:
        folder: what was exported.
        repository: ``name`` or ``organisation/name``.
        public: whether a new repository is for everybody to see.
        note: is told where a repository that exists is public.

    Returns:
        The repository's address.

    Raises:
        RunError: there is no token, no network or no right to write.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub: Any = huggingface_hub.HfApi(library_name="fedcustom")
    said = f"--push-to-hub: {repository}"
    try:
        found = hub.create_repo(repository, private=not public, exist_ok=True)
        if not public and not hub.model_info(found.repo_id).private:
            raise RunError(f"{said}: is there and public; say --public to upload to it")
        hub.upload_folder(repo_id=found.repo_id, folder_path=folder, commit_message=MESSAGE)
    except LocalTokenNotFoundError:
        raise RunError(f"{said}: there is no token; log in with: hf auth login") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(f"{said}: {in_one_line(error)}; the exported folder is {folder}") from None
    note(f"{found.repo_id}: {'public' if public else 'private'}")
    return str(found)
