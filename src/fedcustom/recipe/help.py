"""Help texts and error messages for a recipe's settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..core.errors import RecipeError
from ..core.settings import Settings
from ..methods import registry

MUST_BE = ": must be "
"""Between a setting with its value and what is allowed."""


def settings_help(recipe: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Every setting as (key, type and bounds, default, help), section by section, methods one after the
    other.
    """
    for name, field in recipe.model_fields.items():
        if name == "method":
            for method, registered in registry.methods().items():
                yield f"[method] name = {method!r}", "", "", registered.help
                for key, sub in registered.settings.model_fields.items():
                    if key != "name":
                        yield f"method.{key}", _type_text(sub), _default_text(sub), sub.description or ""
        elif (section := section_of(field)) is not None:
            yield f"[{name}]", "", "", (section.__doc__ or "").strip().splitlines()[0]
            for key, sub in section.model_fields.items():
                yield f"{name}.{key}", _type_text(sub), _default_text(sub), sub.description or ""
        else:
            yield name, _type_text(field), _default_text(field), field.description or ""


def section_of(field: FieldInfo) -> type[Settings] | None:
    """The settings of a section, which may be absent by default; None where the field is none."""
    for found in (field.annotation, *get_args(field.annotation)):
        if isinstance(found, type) and issubclass(found, Settings):
            return found
    return None


def section_help(recipe: type[BaseModel], wanted: str) -> list[tuple[str, str, str, str]]:
    """The part of :func:`settings_help` for one section (``training``), one method (``lora``, or ``method``
    for all) or one setting (``training.batch_size``, ``batch_size``), with the headings above it.

    Raises:
        RecipeError: there is no such section, method or setting.
    """
    found, names = list[tuple[str, str, str, str]](), list[str]()
    heading: tuple[str, str, str, str] | None = None
    section = method = ""
    for entry in settings_help(recipe):
        key = entry[0]
        if key.startswith("["):
            heading, section = entry, key[1:].partition("]")[0]
            method = key.partition("'")[2].rstrip("'")
            names += [name for name in (section, method) if name]
        elif "." not in key:
            heading, section, method = None, "", ""  # a setting of the recipe itself
        whole = wanted in (section, method, f"{section}.{method}") and wanted != ""
        names += [] if key.startswith("[") else [key]
        if whole or (not key.startswith("[") and wanted in (key, key.rpartition(".")[2])):
            if heading is not None and heading not in found:
                found.append(heading)
            if entry not in found:
                found.append(entry)
    if not found:
        raise RecipeError(f"--help-all: no section, method or setting {wanted!r}{_near(wanted, names)}")
    return found


def _near(wanted: str, names: Sequence[str]) -> str:
    sections = dict.fromkeys(name for name in names if "." not in name)
    close = difflib.get_close_matches(
        wanted, [*sections, *names, *(n.rpartition(".")[2] for n in names)], n=1
    )
    return f"; sections: {', '.join(sections)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _type_text(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    arguments = get_args(annotation)
    if arguments and type(None) in arguments:
        arguments = tuple(argument for argument in arguments if argument is not type(None))
        annotation = arguments[0] if len(arguments) == 1 else annotation
    numbers = [each for each in arguments if _bare(each) is float]
    if numbers and len(arguments) > 1:  # a number, or a word in its place
        words = [str(word) for each in arguments if each not in numbers for word in get_args(each)]
        return f"number{_limits(get_args(numbers[0])[1].metadata)} | {' | '.join(words)}"
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str | int) for choice in choices):
        text = " | ".join(map(str, choices))
    elif str(annotation).startswith("list"):
        item = _bare(get_args(annotation)[0])
        known = {str: "list of texts", int: "list of integers", float: "list of numbers"}
        text = known.get(item) or f"list of {' | '.join(map(str, get_args(item)))}"
    elif str(annotation).startswith("dict"):
        text = "table"
    else:
        text = {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}[
            annotation.__name__
        ]
    return text + _limits(field.metadata)


def _bare(annotation: Any) -> Any:
    """A type without what ``Annotated`` says of it."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def _limits(metadata: Sequence[Any]) -> str:
    """Bounds in signs, with a space before them."""
    bounds = {type(item).__name__.lower(): item for item in metadata}
    signs = [("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")]
    limits = [f"{sign} {getattr(bounds[name], name):g}" for name, sign in signs if name in bounds]
    return f" {', '.join(limits)}" if limits else ""


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    return tomli_w.dumps({"value": value}).partition("= ")[2].strip() if not isinstance(value, dict) else "{}"


def explained(problems: Sequence[Any], recipe: type[BaseModel]) -> list[str]:
    """Validation problems, one line each. A setting that may be a number or a word has a problem for each of
    the two, of which one line is made.
    """
    allowed: dict[str, list[str]] = {}
    for problem in problems:
        setting, must, what = explain(problem, recipe).partition(MUST_BE)
        allowed.setdefault(setting, []).extend([what] if must else [])
    return [
        setting + (MUST_BE + " or ".join(dict.fromkeys(what)) if what else "")
        for setting, what in allowed.items()
    ]


def explain(problem: Any, recipe: type[BaseModel]) -> str:
    """One validation problem in one line: key, value, what is allowed, nearest right name."""
    path = [str(part) for part in problem["loc"]]
    if len(path) > 1 and path[0] == "method" and path[1] in registry.names():
        path.pop(1)  # pydantic adds the chosen method's name to the path
    if len(path) > 2 and path[-1].startswith(("constrained-", "literal[")):
        path.pop()  # and, of a number or a word, which of the two it is
    key, kind, value = ".".join(path), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], recipe)
        return f"{key}: unknown setting{nearest(path[-1], known, everywhere=recipe)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, dict) else value
        return f"method.name = {name!r}: unknown method{nearest(str(name), registry.names())}"
    if kind == "literal_error":
        expected = problem["ctx"]["expected"]
        return f"{key} = {value!r}: must be {expected}{_close(value, expected)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    message = message.removeprefix("Input ").replace("should", "must")
    return f"{key} = {value!r}: {message}"


def _known_keys(path: Sequence[Any], recipe: type[BaseModel]) -> list[str]:
    if not path:
        return list(recipe.model_fields)
    if path[0] == "method":
        known = len(path) > 1 and path[1] in registry.names()
        return list(registry.settings_of(path[1]).model_fields) if known else ["name"]
    section = section_of(recipe.model_fields[str(path[0])])
    return list(section.model_fields) if section is not None else []


def nearest(name: str, allowed: Sequence[str], *, everywhere: type[BaseModel] | None = None) -> str:
    """What is allowed and the nearest right name; with ``everywhere``, a recipe, its section with such a key
    too.
    """
    close = difflib.get_close_matches(name, allowed, n=1)
    if not close and everywhere:
        sections = {
            key.rpartition(".")[2]: key
            for key, *_ in settings_help(everywhere)
            if "." in key and "[" not in key
        }
        close = [sections[match] for match in difflib.get_close_matches(name, sections, n=1)]
    return f"; allowed: {', '.join(allowed)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _close(value: Any, expected: str) -> str:
    choices = [choice.strip("' ") for choice in expected.replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
