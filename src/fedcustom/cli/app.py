"""The command line application: its commands, and what becomes of an error."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..core.errors import FedcustomError
from ..core.library_errors import in_one_line, while_loading
from ..core.memory_errors import HINT, out_of_memory
from .answers import ask, chat, index, predict
from .audit import audit
from .cache import cache
from .certificates import deploy, site
from .check import check
from .console import err_console, write_any_text
from .doctor import doctor
from .estimate import estimate
from .experiment import experiment
from .export import export
from .new import new
from .privacy import privacy
from .recipe import recipe
from .runs import compare, report, run
from .serve import serve
from .watch import watch


class InOrder(TyperGroup):
    """The commands in the order in which they are needed."""

    def list_commands(self, context: Any) -> list[str]:
        """Their names, for ``--help``."""
        order = (
            "new", "check", "run", "compare", "experiment", "estimate", "privacy", "watch", "report", "audit",
            "predict", "chat", "serve", "export", "recipe", "index", "ask", "deploy", "site", "doctor",
            "cache",
        )  # fmt: skip
        return sorted(self.commands, key=order.index)


app = typer.Typer(
    cls=InOrder,
    help="Customise a large pretrained model with data that stays with its owners.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(new)
app.command()(check)
app.command()(run)
app.command()(compare)
app.command()(experiment)
app.command()(estimate)
app.command()(privacy)
app.command()(watch)
app.command()(report)
app.command()(audit)
app.command()(predict)
app.command()(chat)
app.command()(doctor)
app.command()(serve)
app.command()(export)
app.command()(recipe)
app.command()(cache)
app.command()(index)
app.command()(ask)
app.add_typer(deploy, name="deploy")
app.add_typer(site, name="site")

DEBUG = "--debug"
"""The option that shows tracebacks; :func:`main` takes it from anywhere on the command line."""


def main() -> NoReturn:
    """Run the command line; what a user can mend is one line on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _stop)
    write_any_text()
    debug = DEBUG in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        app(args=arguments, standalone_mode=True)
    except FedcustomError as error:
        _fail(str(error), error, debug)
    except BrokenPipeError:  # the reader of our output has gone, as in: fedcustom ... | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(0)
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        _fail(what, error, debug)
    except Exception as error:
        if out_of_memory(error):
            _fail(f"out of memory: {in_one_line(error)[:200]}; {HINT} (docs/memory.md)", error, debug)
        if not while_loading(error):
            raise
        _fail(f"{in_one_line(error)} ({DEBUG} shows where it comes from)", error, debug)
    sys.exit(0)


def _fail(text: str, error: BaseException, debug: bool) -> NoReturn:
    """Say in one line what is wrong, with ``debug`` after the traceback, and exit with code 2."""
    if debug:
        err_console.print("".join(traceback.format_exception(error)), soft_wrap=True)
    err_console.print(f"error: {text}", style="bold red", soft_wrap=True)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedcustom {version('fedcustom')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="With an error, show the traceback too (anywhere on the command line)")
    ] = False,
) -> None:
    """Customise a large pretrained model with data that stays with its owners."""


def _stop(*_: object) -> None:
    """End as Ctrl-C does. SIGINT itself would not do: a shell lets its background jobs ignore it."""
    raise KeyboardInterrupt
