"""The ``export`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.errors import FedcustomError
from .console import NoCheck, RunDirectory, note, out_console


def export(
    directory: RunDirectory,
    to: Annotated[Path, typer.Option(help="A new or an empty folder for the model")],
    form: Annotated[
        Literal["model", "feed-forward"],
        typer.Option(
            "--as",
            help="feed-forward: a plain model with wider feed-forward networks, without code of its own "
            "(prefix with kind = 'memory', distilled on --text; adapter)",
        ),
    ] = "model",
    text: Annotated[
        Path | None, typer.Option(help="Public texts for --as feed-forward, one unlabelled text a line")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Extra units in each network for --as feed-forward (default: as many numbers)"
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add a LoRA or IA3 adapter to the base model's weights")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPOSITORY",
            help="Upload the folder to this repository of the Hugging Face hub (after: hf auth login)",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: for everybody to see (default: private)")
    ] = False,
    no_check: NoCheck = False,
) -> None:
    """Write the customised model to a folder, to be loaded by peft or transformers without this package, with
    a model card.

    Example: fedcustom export runs/first --to my-model --merge
    """
    from .. import api
    from ..exporting.hub import check_repository

    if public and push_to_hub is None:
        raise FedcustomError("--public: has an effect with --push-to-hub alone")
    finished = api.load(directory)
    if push_to_hub is not None:
        check_repository(push_to_hub)  # before what takes long
    folder = finished.export(
        to, form=form, text=text, slots=slots, merge=merge, check=not no_check, note=note
    )
    out_console.print(f"model: {folder} (its README.md shows how to load it)", soft_wrap=True)
    if push_to_hub is not None:
        out_console.print(f"hub: {finished.push_to_hub(folder, push_to_hub, public=public, note=note)}")
