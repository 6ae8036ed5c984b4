"""Light imports: ``transformers`` and ``peft`` without what their modules import for other uses.

Importing the modelling code of ``transformers`` imports torch's compiler, its distributed tensors, scipy,
accelerate and torchao; ``peft`` adds bitsandbytes. That takes twice as long as torch itself, and training an
adapter needs none of it. Within :func:`light_imports` such a name is a stand-in, which imports the library
when it is called or read.

This changes how Python imports, for the whole process. It is for processes that are this package's own (the
command line); a process of a user's, in which ``import fedcustom`` is one import among many, is left alone.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import os
import sys
import types
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from .settings import ModelSettings

OFF = "FEDCUSTOM_LIGHT_IMPORTS"
"""The environment variable that switches this off, with the value 0."""

IMPORTERS = ("transformers.", "peft.")
"""Modules whose imports are put off."""

PUT_OFF = ("accelerate", "bitsandbytes", "scipy", "sklearn", "torchao", "torch._dynamo", "torch.distributed")
"""What they import only when it is used."""

COMPILER = "torch._dynamo"
COMPILER_ASKED_BY = ("torch._compile", "torch.compiler", "torch.optim.")
"""Modules of torch that import its compiler to keep it out of functions, or to tell it where a graph ends."""


class _Later(type):
    """A name of a module that is not imported yet: a class, so that it serves in annotations and
    ``isinstance``. Nothing is an instance of a class whose module nobody has imported.
    """

    origin: str

    @classmethod
    def of(cls, module: str, name: str) -> Any:
        return cls(name, (), {"origin": module})

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        """A stand-in, or a class derived from some: that needs the classes themselves."""
        if not bases:
            return super().__new__(cls, name, bases, namespace)
        found = [base.__real() if isinstance(base, _Later) else base for base in bases]
        return types.new_class(name, found, options, lambda body: body.update(namespace))

    def __real(cls) -> Any:
        return getattr(importlib.import_module(cls.origin), cls.__name__)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        return cls.__real()(*arguments, **options)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.__real(), name)

    def __instancecheck__(cls, thing: object) -> bool:
        return cls.origin in sys.modules and isinstance(thing, cls.__real())

    def __subclasscheck__(cls, other: type) -> bool:
        return cls.origin in sys.modules and issubclass(other, cls.__real())


class _LaterModule(types.ModuleType):
    """A module that is imported when one of its names is read. ``kept`` are names that need no import."""

    def __init__(self, name: str, **kept: Any) -> None:
        super().__init__(name)
        vars(self).update(kept)

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return version(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def light_imports(settings: ModelSettings) -> Iterator[None]:
    """Let ``transformers`` and ``peft`` be imported without what training a model does not need.

    Does nothing where the model is compiled or quantised, for which those libraries are needed, or where
    ``FEDCUSTOM_LIGHT_IMPORTS`` is 0. Inside, ``transformers`` takes torch to be built without its distributed
    package, and functions that are marked for torch's compiler are not.
    """
    if settings.compile or settings.quantization or settings.device_map or os.environ.get(OFF) == "0":
        yield
        return
    usual = builtins.__import__

    def light(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer = (globals or {}).get("__name__") or ""
        if name == COMPILER and importer.startswith(COMPILER_ASKED_BY) and COMPILER not in sys.modules:
            return sys.modules["torch"]  # whose compiler is a stand-in
        if level or not importer.startswith(IMPORTERS) or not _put_off(name):
            found = usual(name, globals, locals, fromlist, level)
            if importer == "transformers" and name == "utils.import_utils":
                _look_through_folders_once(found)
            return found
        if not fromlist:
            return _stand_in(name) if "." not in name else usual(name, globals, locals, fromlist, level)
        return types.SimpleNamespace(**{each: _Later.of(name, each) for each in fromlist})

    builtins.__import__ = light
    try:
        with _without_compiler(), _with_later_tensors():
            with _collecting_later(), _without_distributed_tensors():
                pass
            yield
    finally:
        builtins.__import__ = usual


def _look_through_folders_once(import_utils: Any) -> None:
    """``transformers`` reads the names that its model folders define for itself, and again for its package
    of models.
    """
    usual = import_utils.create_import_structure_from_path
    known: dict[str, Any] = {}

    def once(path: Any) -> Any:
        folder = os.path.dirname(path) if os.path.isfile(path) else os.fspath(path)
        if folder not in known:
            known[folder] = usual(path)
        return known[folder]

    import_utils.create_import_structure_from_path = once


def _put_off(name: str) -> bool:
    """Whether a module is one of those, or in one; torch's distributed package itself is a part of torch."""
    return name != "torch.distributed" and any(
        name == each or name.startswith(f"{each}.") for each in PUT_OFF
    )


def _stand_in(name: str) -> _LaterModule:
    """A module that is imported by its name alone. ``peft`` looks whether bitsandbytes has its layers."""
    if name != "bitsandbytes":
        return _LaterModule(name)
    layers = {each: _Later.of("bitsandbytes.nn", each) for each in ("Linear4bit", "Linear8bitLt")}
    return _LaterModule(name, nn=_LaterModule("bitsandbytes.nn", **layers))


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Torch without its compiler: what would be kept out of it or marked for it is left as it is."""
    import torch

    def unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else unchanged

    def nothing(*_: Any, **__: Any) -> None:
        return None

    marks = ("disable", "allow_in_graph", "assume_constant_result")
    compiler = _LaterModule(COMPILER, graph_break=nothing, **dict.fromkeys(marks, unchanged))
    with _attribute(torch, "_dynamo", compiler):
        yield


@contextlib.contextmanager
def _with_later_tensors() -> Iterator[None]:
    """``peft`` asks of each layer whether its weight is a distributed tensor."""
    from torch import distributed

    name = "torch.distributed.tensor"
    with _attribute(distributed, "tensor", _LaterModule(name, DTensor=_Later.of(name, "DTensor"))):
        yield


@contextlib.contextmanager
def _attribute(module: types.ModuleType, name: str, stand_in: _LaterModule) -> Iterator[None]:
    """A module with a stand-in for one of its modules, unless that is there; it may come meanwhile."""
    if stand_in.__name__ in sys.modules:
        yield
        return
    vars(module)[name] = stand_in
    try:
        yield
    finally:
        if vars(module).get(name) is stand_in:
            del vars(module)[name]


@contextlib.contextmanager
def _without_distributed_tensors() -> Iterator[None]:
    """``transformers`` as for a torch that is built without its distributed package."""
    from torch import distributed
    from transformers.utils import import_utils

    before = distributed.is_available
    distributed.is_available = lambda: False
    try:
        import_utils.is_torch_distributed_available()  # which keeps its answer
        yield
    finally:
        distributed.is_available = before


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """Hundreds of thousands of objects are made by imports, and none of them is garbage: do not look for
    garbage meanwhile, nor among them later.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
