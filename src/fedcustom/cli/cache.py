"""The ``cache`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import out_console


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is there")] = False,
) -> None:
    """Show or clear the cache folder: parsed docstrings of installed packages, and converted models. No
    client's data are in it.

    Example: fedcustom cache --clear
    """
    from ..core.cache import cache_folder, cache_size, clear_cache

    found = clear_cache() if clear else cache_size()
    text = f"{cache_folder()}: {found.files} files, {found.bytes:,} bytes"
    out_console.print(f"{text} removed" if clear else text, soft_wrap=True)
