"""Silence of ``transformers`` while it loads a model, and of libraries for quantisation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

KERNELS = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of libraries that warn, whenever ``peft`` imports them, of kernels which nothing here uses."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and the load report; what a user has to know of it, this package says itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hear_errors_alone() -> None:
    """From now on, libraries for quantisation say nothing of kernels that they cannot load."""
    for name in KERNELS:
        logging.getLogger(name).setLevel(logging.ERROR)
