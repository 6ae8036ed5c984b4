"""Errors of other libraries while they load a model or data: mostly about a file that a user can mend."""

from __future__ import annotations

from types import TracebackType

LIBRARIES = frozenset(
    {
        *(
            "transformers",
            "tokenizers",
            "huggingface_hub",
            "safetensors",
            "safetensors_rust",
            "sentencepiece",
        ),
        *("peft", "datasets", "pyarrow"),
    }
)
"""Packages that read models, tokenizers and data."""

LOADING = (
    "fedcustom.models.load",
    "fedcustom.models.configuration",
    "fedcustom.models.tokenizer_check",
    "fedcustom.data.",
    "fedcustom.api",
    "fedcustom.exporting",
)
"""Modules of this package in which they are called to."""

KINDS = (ValueError, LookupError, ImportError, OSError, RuntimeError)
"""Errors about a value or a file. A ``TypeError`` or ``AttributeError`` is a wrong call, and so a bug."""


def from_library(error: BaseException) -> bool:
    """Whether an error comes out of one of :data:`LIBRARIES`, and says that a value or a file is wrong.

    The Rust parts of ``tokenizers`` and ``safetensors`` raise ``Exception`` itself and an error of their own.
    """
    modules = _modules(error.__traceback__)
    own = type(error) is Exception or type(error).__module__.partition(".")[0] in LIBRARIES
    return bool(modules) and modules[-1].partition(".")[0] in LIBRARIES and (own or isinstance(error, KINDS))


def while_loading(error: BaseException) -> bool:
    """Whether an error comes out of a library that was loading a model or data for this package."""
    called = any(module.startswith(LOADING) for module in _modules(error.__traceback__))
    return called and from_library(error)


def in_one_line(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _modules(traceback: TracebackType | None) -> list[str]:
    """The modules through which an error went, that in which it was raised last."""
    found = []
    while traceback is not None:
        found.append(str(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next
    return found
