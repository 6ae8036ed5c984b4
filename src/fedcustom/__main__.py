"""``python -m fedcustom``."""

from .cli import main

main()
