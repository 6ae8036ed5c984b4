"""The types that docstrings and signatures write, in classes; and their prose without markup."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

LABELS = ("bool", "int", "float", "str", "array", "sequence", "mapping", "callable", "other")

ROLE = (r":[a-z]+(?::[a-z]+)?:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1")
REDUCTIONS = (
    # What is taken out of an annotation, in this order, before it is split into the types of a union.
    ROLE,
    (r"\[?`+~?([^`]*)`*\]?", r"\1"),
    (r"(?i),?\s*[(*]*\boptional\b(?!\[)[*)]*", ""),
    (r"\*(\w+)\*", r"\1"),
    (r"(?s),?\s*[(\[]?\b(?<!['\"])(defaults?\b|returned when|deprecated\b|with\b).*", ""),
    (r"(^\s*|, | or |\| ?)\{([^{}]*)\}", r"\1\2"),
    (r",?\s*\b(of )?\s*(shape|length|size|dtype)s?\s*[:=]?\s*[(\[][^()\[\]]*[)\]](\s*or\s*\([^()]*\))*", ""),
    (r",?\s*\bdtype\s*=\s*[\w.]+", ""),
    (r"^\s*\([^()]*\)\s+(?=[A-Za-z])(?!or\b)", ""),
    (r"\b[A-Za-z_]\w*\.(?=[A-Za-z_])", ""),
    (r"^\s*\[(\w+)\]", r"\1"),
)
QUALIFIERS = (
    # Parts of an annotation that say something about a type and are none.
    r"(none(type)?|null|nan|na|no_default|required|positive|non-?negative|keyword[- ]only|\.*)$",
    r"(of|in|where|if|for|same|one of|at least|size|shape|length|must|between|compatible)\s",
    r"[<>=]|\((?!.*\b(bool|int|float|str|scalar|array))",
)
CLASSES = (
    # A type has the class of the first pattern found in its name; where none is found it is "other".
    ("str", r"^['\"]"),
    ("sequence", r"^[(\[]|^Size$|^BroadcastingList"),
    ("bool", r"^(True|False)$"),
    ("int", r"^[-+]?\d+$"),
    ("float", r"^[-+]?(\d*\.\d+|\d+\.|inf)$"),
    ("callable", r"(?i)\b(callables?|functions?|func|fn|ufunc)\b"),
    ("mapping", r"\b(\w*Dict|\w+_dict|defaultdict|dicts?|[Dd]ictionar(y|ies)|\w*Mapping|mapping)\b"),
    ("array", r"(?i)\b(\w*array(s|[-_ ]?likes?)?|\w*tensors?|\w*matrix|matrices|vectors?)\b"),
    ("array", r"\b(DataFrames?|Series|\w*Index|Parameters?)\b"),
    ("sequence", r"(?i)\b(\w*lists?|list[-_]?like|tuples?|sets?|frozenset|orderedset|\w*sequences?)\b"),
    ("sequence", r"(?i)\b(iterables?|iterators?|collection|pair)\b"),
    ("bool", r"(?i)\b(bool(ean)?s?|bool_)\b"),
    ("int", r"(?i)\b(u?int(\d+|p)?|ints|integers?|symint)\b"),
    ("float", r"(?i)\b(floats?\d*|double|real|scalars?|numbers?(?! generator)|numeric|complex\d*)\b"),
    ("str", r"(?i)\b(str|strings?|path|path[-_ ]?like|filename|filepath)\b"),
)
UNIONS = (
    # A union of the left class with right ones alone has the left class; every other union is "other".
    ("int", {"bool"}),
    ("float", {"bool", "int"}),
    ("array", {"bool", "int", "float", "sequence"}),
    ("sequence", {"bool", "int", "float", "str"}),
)
MARKUP = (
    # What is taken out of prose, in this order.
    (r"(?s)(>>> |```|\n\s*\.\. (code-block|plot|math|table|list-table|ipython)::).*", " "),
    (r"(?s)\.\. (versionadded|versionchanged|deprecated)::.*?(\n\s*\n|$)", "\n"),
    (r"\.\. [\w-]+::|</?(Tip|br)[^>]*>|\[\d+\]_|<!--.*?-->", " "),
    ROLE,
    (r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1"),
    (r"\[`~?([^`\]]+)`\]", r"\1"),
    (r"\[([^\]]+)\]\((?:https?:|\.|#|/)[^)]*\)", r"\1"),
    (r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])", r"\1"),
    (r"`_+(?!\w)|`~?", ""),
    (r"\\([*_|])", r"\1"),
    (r"::(?=\s|$)", ":"),
    (r"\s+", " "),
)

_QUALIFIER = re.compile("|".join(QUALIFIERS), re.IGNORECASE)
_WRAPPER = re.compile(r"(?s)(?:Optional|Union|Literal|Annotated|Final)\[(.*)\]$")
_SEPARATOR = re.compile(r"'[^']*'|\"[^\"]*\"|[(\[{]|[)\]}]|,|;|\||\bor\b|/")
_HEAD_END = re.compile(r"(?!^)(\bof\b|\bin\b|\bfrom\b|\bto\b|->|[\[({<>=])")


@functools.cache
def type_label(annotation: str) -> str | None:
    """The class of a type as a docstring or signature writes it, or nothing where it names no type.

    ``None`` counts for nothing in a union, and a choice of strings is a ``str``. Single types are looked up
    in :data:`CLASSES`, unions in :data:`UNIONS`.
    """
    found = _classes(annotation)
    if len(found) <= 1:
        return next(iter(found), None)
    return next((label for label, others in UNIONS if label in found and found <= others | {label}), "other")


@functools.lru_cache(20_000)
def plain_text(prose: str) -> str:
    """``prose`` on one line, without the markup of reStructuredText and Markdown."""
    for pattern, replacement in MARKUP:
        prose = re.sub(pattern, replacement, prose)
    return prose.strip()


def _classes(annotation: str) -> set[str]:
    for pattern, replacement in REDUCTIONS:
        annotation = re.sub(pattern, replacement, annotation)
    found: set[str] = set()
    for part in _parts(annotation):
        if wrapped := _WRAPPER.match(part):
            found |= _classes(wrapped[1])
            continue
        # What a container holds does not matter: "list of str" and "list[str]" are lists.
        name = part if part[:1] in tuple("([\"'") else _HEAD_END.split(part, maxsplit=1)[0].strip()
        if not _QUALIFIER.match(name):
            found.add(next((label for label, pattern in CLASSES if re.search(pattern, name)), "other"))
    return found


def _parts(annotation: str) -> Iterator[str]:
    """The types of a union, split where no bracket is open."""
    depth = start = 0
    for match in _SEPARATOR.finditer(annotation):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth = max(0, depth - 1)
        elif token[0] not in "\"'" and depth == 0:
            yield annotation[start : match.start()].strip()
            start = match.end()
    yield annotation[start:].strip()
