"""Entry point of ``python -m fedcustom``."""

from .cli.app import main

main()
