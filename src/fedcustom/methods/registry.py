"""The registry of methods: each method's settings class registers itself, and is found without a list.

A folder of this package with a ``settings`` module is a method; other packages offer theirs under the
entry-point group ``fedcustom.methods``, each the settings class itself (``my_package.settings:MySettings``).
Settings are imported here, implementations only when one is built.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from ..core import plugins
from ..core.errors import ModelError, PluginError
from .settings import MethodSettingsBase, TuningSettings

if TYPE_CHECKING:
    from ..models.load import Base
    from .protocol import Method
    from .tuning.technique import Context

S = TypeVar("S", bound=MethodSettingsBase)

OWN_PACKAGE = __name__.partition(".")[0]

LAST = 1000
"""The place of a method that asks for none."""


@dataclass(frozen=True)
class Registration:
    """What a method's settings class registered.

    ``implementation`` is ``"module:attribute"``: of a technique (settings derived from
    :class:`~.settings.TuningSettings`) a callable of the settings that gives a
    :class:`~.tuning.technique.Technique`; of any other method a callable of the settings and a
    :class:`~.tuning.technique.Context` that gives a :class:`~.protocol.Method`. ``title`` is the method as
    people write it. ``colours`` are those of its curves on a light page and on a dark one; ``symbol`` is that
    of its points. ``package`` is the installed package that it belongs to.
    """

    name: str
    settings: type[MethodSettingsBase]
    implementation: str
    title: str
    symbol: str | None
    colours: tuple[str, str] | None
    order: int
    package: str

    @property
    def is_technique(self) -> bool:
        """Whether it says which tensors are trained, and shares the verbs of those that do."""
        return issubclass(self.settings, TuningSettings)

    @property
    def help(self) -> str:
        """One line about the method: the first of its settings' docstring."""
        return (self.settings.__doc__ or "").strip().partition("\n")[0]

    def load(self) -> Any:
        """The implementation, imported now.

        Raises:
            PluginError: another package's method cannot be imported.
        """
        module, _, attribute = self.implementation.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if self.package == OWN_PACKAGE:
                raise
            raise PluginError(
                f"method.name = {self.name!r}: {self.implementation} of package {self.package!r} "
                f"cannot be imported: {error}"
            ) from error


_registered: dict[str, Registration] = {}


def register(
    implementation: str,
    *,
    title: str | None = None,
    symbol: str | None = None,
    colours: tuple[str, str] | None = None,
    order: int = LAST,
) -> Callable[[type[S]], type[S]]:
    """Register a method by its settings class, which says its name: ``name: Literal["x"] = "x"``.

    Args:
        implementation: ``"module:attribute"``, imported when the method is built; a module that begins with
            a dot is relative to that of the settings (:class:`Registration` says what it must be).
        title: The method as people write it; by default its name with spaces.
        symbol: That of its points in charts, one of :data:`fedcustom.report.svg.MARKS`; by default none
            of its own.
        colours: Of its curves, on a light page and on a dark one, as ``#rrggbb``; by default one that it may
            share with others.
        order: Its place in lists, the smallest first.

    Raises:
        ValueError: the class says no name, or the name is taken.
    """

    def decorator(settings: type[S]) -> type[S]:
        name = _name_of(settings)
        if name in _registered:
            raise ValueError(f"method {name!r} is registered already, by {_registered[name].settings}")
        module, _, attribute = implementation.partition(":")
        if module.startswith("."):
            module = settings.__module__.rpartition(".")[0] + module
        _registered[name] = Registration(
            name,
            settings,
            f"{module}:{attribute}",
            title or name.replace("_", " "),
            symbol,
            colours,
            order,
            OWN_PACKAGE,
        )
        return settings

    return decorator


def _name_of(settings: type[MethodSettingsBase]) -> str:
    field = settings.model_fields.get("name")
    values = get_args(field.annotation) if field is not None else ()
    if field is None or get_origin(field.annotation) is not Literal or values != (field.default,):
        raise ValueError(f'{settings.__name__}: needs a field such as name: Literal["mine"] = "mine"')
    return str(field.default)


@cache
def methods() -> Mapping[str, Registration]:
    """Every method by name: this package's in their order, then those of other packages.

    A plug-in that cannot be loaded is left out, with a line on the log that names its package.
    """
    package = import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__, f"{__package__}."):
        if found.ispkg and find_spec(f"{found.name}.settings") is not None:
            import_module(f"{found.name}.settings")
    own = [
        name for name, each in _registered.items() if each.settings.__module__.startswith(f"{__package__}.")
    ]  # a plug-in's settings may have been imported, and so registered, before
    names = sorted(own, key=lambda name: (_registered[name].order, name))
    for name, point in plugins.offered(plugins.METHODS, tuple(names)).items():
        before = dict(_registered)
        try:
            settings = plugins.load(point)
            given = [each.name for each in _registered.values() if each.settings is settings]
            if given != [name]:
                raise PluginError(
                    f"{plugins.title(point)} must be a settings class with @register and the name {name!r}"
                )
            _registered[name] = replace(_registered[name], package=plugins.package_of(point))
            names.append(name)
        except PluginError as error:
            _registered.clear()
            _registered.update(before)  # what it may have registered before it failed
            plugins.report(point, str(error).removeprefix(f"{plugins.title(point)} "))
    return {name: _registered[name] for name in names}


@cache
def names() -> list[str]:
    """The names of all methods."""
    return list(methods())


def settings_of(name: str) -> type[MethodSettingsBase]:
    """The settings class of a method.

    Raises:
        KeyError: there is no such method.
    """
    return methods()[name].settings


def settings_union() -> Any:
    """The settings of any method, as a type: a union of classes that are told apart by ``name``."""
    return Union[tuple(each.settings for each in methods().values())]  # noqa: UP007


def check_padding(name: str, base: Base) -> None:
    """Refuse a model whose results padding changes, for methods that pad their batches.

    Raises:
        ModelError: names the model and the methods that can be used.
    """
    if base.padding == "none":
        raise ModelError(
            f"method {name} pads its batches, and padding changes what {base.name} makes of a text; use a "
            "method that trains its weights, such as lora, or another base model"
        )


def build_method(settings: MethodSettingsBase, context: Context) -> Method:
    """The method that a recipe names.

    Raises:
        ModelError: the method does not fit the base model.
        PluginError: another package's method cannot be imported.
    """
    registration = methods()[settings.name]
    implementation = registration.load()
    if not registration.is_technique:
        if settings.pads:
            check_padding(settings.name, context.base)
        made: Method = implementation(settings, context)
        return made
    from .tuning.method import WeightTuning

    return WeightTuning(implementation(settings), context, name=settings.name)
