"""The ``serve`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import FedcustomError
from .console import note

KEY = "FEDCUSTOM_API_KEY"
"""The environment variable with the key that callers must send."""


def serve(
    directory: Annotated[Path, typer.Argument(help="A finished run's directory, or a document index")],
    host: Annotated[
        str, typer.Option(help="Address to listen to; other machines reach the server unless it is loopback")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests (default: the directory's)")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY,
            show_envvar=True,
            help="Key that callers must send; in the variable rather than here, where other users see it",
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait for the one at work; more are refused")
    ] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that a request may ask for")] = 4096,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request in bytes")] = 2**20,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a request, with the time that it waits for others")
    ] = 300,
) -> None:
    """Serve a finished run with OpenAI's interface: chats, texts, classes (/v1/classify) and answers from
    documents (/v1/ask).

    Example: fedcustom serve runs/assistant --port 8000

    Then, in Python: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").
    """
    if api_key is not None and len(api_key.strip()) < 1:
        raise FedcustomError(f"--api-key, or {KEY}: is empty; leave it unset for no key")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise FedcustomError("serve: needs FastAPI and uvicorn: pip install 'fedcustom[serve]'") from None
    from ..serving.app import Limits
    from ..serving.server import serve as serve_until_stopped

    try:
        serve_until_stopped(
            directory,
            host=host,
            port=port,
            name=name,
            api_key=api_key,
            limits=Limits(max_body, max_waiting, timeout),
            most_tokens=max_tokens,
            note=note,
        )
    except KeyboardInterrupt:
        note("stopped")
