"""The Python interface: run a recipe, open a finished run, use its model and history."""

from .finished_run import ChatReply, Run
from .running import default_directory, load, run

__all__ = ["ChatReply", "Run", "default_directory", "load", "run"]
