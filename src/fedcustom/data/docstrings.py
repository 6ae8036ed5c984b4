"""The built-in data set: docstrings of packages that are installed anyway, one package a natural client.

Two tasks come from one parse. *Classification* is a parameter's description and the class of its type, one of
:data:`~.docstring_types.LABELS`; *generation* is a function's signature and the first sentence of its
docstring.

Nothing is imported or run. Definitions are found in the source text (parsing whole files would take several
times as long), their headers are read with :mod:`ast` and their docstrings with griffe. Tests, and files that
document no parameter, are left out. A cache keeps one file a package, named by the digest of its sources.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Literal

from griffe import Docstring, DocstringParameter, DocstringSectionKind, DocstringStyle, parse

from ..core.cache import cache_folder, private
from ..core.errors import DataError, nearest
from .docstring_types import ROLE, plain_text, type_label

Task = Literal["classification", "generation"]
Row = dict[str, str]
Rows = dict[str, list[Row]]
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Node = _Function | ast.ClassDef

PACKAGES = ("numpy", "sklearn", "pandas", "torch", "transformers", "scipy", "matplotlib", "networkx")
FIELDS = {
    "classification": ("package", "function", "parameter", "text", "label"),
    "generation": ("package", "function", "source", "target"),
}
PARSER = 1  # raise it whenever the rows change, so that older cache files are left alone

TEXT_LENGTH = 400
SOURCE_LENGTH = 300
TARGET_WORDS = range(3, 61)
TESTS = {"tests", "test", "testing", "conftest"}

MARKS = ("Parameters", "Args:", "Arguments:", ":param ")
STYLES: tuple[tuple[DocstringStyle, str], ...] = (
    ("numpy", r"(?m)^[ \t]*(Other )?Parameters[ \t]*\n[ \t]*---"),
    ("google", r"(?m)^[ \t]*(Args|Arguments|Parameters|Params|Keyword Args|Keyword Arguments):[ \t]*$"),
    ("google", r"^\s*[rR]?\"\"\"\s*\w+ \(`.*\):\n"),
    ("sphinx", r"(?m)^[ \t]*:param "),
)
MENDS = {
    # Where griffe would lose something: in numpy's style choices over several lines and what follows them.
    "numpy": (
        (r"(?m)^([\w*, ]+ : )([^\n{]*\{[^{}]*\})", lambda match: f"{match[1]} {' '.join(match[2].split())}"),
    ),
    "google": (
        ROLE,  # its colon would end a name, as would one in a default
        (r"(?m)^(\s*\w+ \(.*?),? defaults to .*\):", r"\1):"),
        (r"(?s)\A(?=\w+ \(`[^\n]*\):\n)(.*)", lambda match: "Args:\n" + indent(match[0], "    ")),  # no title
        (STYLES[1][1], r"\n\g<0>"),  # no blank line before a title
        (r"\A", ".\n"),  # no summary
    ),
}

_DEFINITION = re.compile(r"(?m)^([ \t]*)(?:async +)?(?:def|class) +(\w+)")
_HEADER_END = re.compile(r":[ \t]*(?:#[^\n]*)?\n")
_DOCSTRING = re.compile(r"(?s)\s*[rRuU]?(\"\"\"|''').*?(?<!\\)\1")
_SECTION = re.compile(r"\n[ \t]*(?:[A-Z][\w ]*:[ \t]*(?:\n|$)|[A-Z][\w ]*\n[ \t]*-{3}|:\w+ )")
_NO_SUMMARY = re.compile(r"(?ms)\**\w+ ?\(|[\w ]+(:\s*$|\n *---)|[\w.]+\s*=|[^\w`*\"'\[:]|:param|See |.*%\(")
_SENTENCE = re.compile(r"(?s).+?(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)(?<!\bcf)(?<!\b[A-Z])[.!?](?=\s|$)")


def docstring_rows(task: Task, packages: Sequence[str] = PACKAGES, cache: Path | None = None) -> list[Row]:
    """Rows of ``task`` from the docstrings of installed packages, in a fixed order: package, file, line.

    Args:
        task: ``classification`` gives the fields package, function (dotted name), parameter, text (the
            description alone) and label (one of
            :data:`~.docstring_types.LABELS`); ``generation`` gives package, function,
            source (the signature; a method's name after its class) and target (one sentence).
        packages: import names of top-level packages.
        cache: where parsed packages are kept, by default ``docstrings`` in the cache folder
            (:func:`~fedcustom.core.cache.cache_folder`). If it cannot be written, a warning says so.

    Raises:
        DataError: the task is unknown, or a package is not installed.
    """
    if task not in FIELDS:
        raise DataError(f"builtin:docstrings: unknown task {task!r}{nearest(task, tuple(FIELDS))}")
    distributions = importlib.metadata.packages_distributions()
    folders = {package: _package_folder(package, distributions) for package in packages}
    rows: list[Row] = []
    for package, folder in folders.items():
        path = (cache or cache_folder() / "docstrings") / f"{package}-{_digest(folder)}.jsonl.gz"
        parsed = _read_cache(path, package)
        if parsed is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in other people's strings
                parsed = _parse_package(package, folder)
            _write_cache(path, parsed)
        rows.extend(parsed[task])
    return rows


@dataclass(frozen=True, slots=True)
class _Definition:
    """A function or class: its names from the module inwards, and the text of its header and docstring."""

    names: tuple[str, ...]
    header: str
    docstring: str

    def parsed(self) -> _Node | None:
        text = self.header + (self.docstring or " " * 99 + "pass")
        try:
            tree = ast.parse(f"if True:\n{text}" if text[0].isspace() else text)
        except (SyntaxError, ValueError):
            return None
        return next((node for node in ast.walk(tree) if isinstance(node, _Node)), None)


def _definitions(source: str) -> list[_Definition]:
    """Every function and class of a file, in order.

    A header ends with the first line that ends with a colon. Docstrings are not searched for definitions.
    """
    found: list[_Definition] = []
    scope: list[tuple[int, str]] = []
    match = _DEFINITION.search(source)
    while match:
        following = _DEFINITION.search(source, match.end())
        colon = _HEADER_END.search(source, match.end(), following.start() if following else len(source))
        if colon:
            docstring = _DOCSTRING.match(source, colon.end())
            depth = len(match[1])
            scope = [*(outer for outer in scope if outer[0] < depth), (depth, match[2])]
            texts = (source[match.start() : colon.end()], docstring[0] if docstring else "")
            found.append(_Definition(tuple(name for _, name in scope), *texts))
            if docstring and following and following.start() < docstring.end():
                following = _DEFINITION.search(source, docstring.end())
        match = following
    return found


def _sources(folder: Path) -> Iterator[Path]:
    """A package's files of Python but for its tests, in a fixed order."""
    for path in sorted(folder.rglob("*.py")):
        location = path.relative_to(folder).with_suffix("").parts
        if not any(part in TESTS or part.startswith("test_") for part in location):
            yield path


def _digest(folder: Path) -> str:
    """The digest of :data:`PARSER` and of a package's files: their names and contents."""
    digest = hashlib.blake2b(str(PARSER).encode(), digest_size=16)
    for path in _sources(folder):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _parse_package(package: str, folder: Path) -> Rows:
    described: dict[tuple[str, str], Row] = {}
    summarised: dict[tuple[str, str], Row] = {}
    for path in _sources(folder):
        location = path.relative_to(folder).with_suffix("").parts
        text = path.read_text(encoding="utf-8", errors="replace")
        if not any(mark in text for mark in MARKS):
            continue
        module = [package, *(part for part in location if part != "__init__")]
        definitions = _definitions(text)
        constructors = {found.names[:-1]: found for found in definitions if found.names[-1] == "__init__"}
        for definition in definitions:
            style = next((name for name, pattern in STYLES if re.search(pattern, definition.docstring)), None)
            public = not any(name.startswith("_") for name in definition.names)
            node = definition.parsed() if definition.docstring and (style or public) else None
            docstring = ast.get_docstring(node) if node else None
            if node is None or not docstring:
                continue
            origin = {"package": package, "function": ".".join((*module, *definition.names))}
            if style:
                constructor = constructors.get(definition.names) if isinstance(node, ast.ClassDef) else None
                signature = constructor.parsed() if constructor else node
                for parameter, description, label in _parameters(docstring, style, signature):
                    row = {"parameter": parameter, "text": description, "label": label}
                    described.setdefault((description, label), origin | row)
            if public and isinstance(node, _Function) and (target := _first_sentence(docstring)):
                # One row for a method that many classes repeat.
                source = f"def {'.'.join(definition.names)}({ast.unparse(node.args)})"
                row = {"source": _cut(source, SOURCE_LENGTH, ", ", ", ...)"), "target": target}
                summarised.setdefault((node.name, target), origin | row)
    return {"classification": list(described.values()), "generation": list(summarised.values())}


def _parameters(docstring: str, style: DocstringStyle, node: _Node | None) -> Iterator[tuple[str, str, str]]:
    """Name, description and class of every parameter that is described and whose type is known."""
    for item in _documented(docstring, style):
        name, _, unread = re.sub(r"\s*\(", "(", item.name.strip(), count=1).partition("(")
        written = str(item.annotation) if item.annotation is not None else unread
        label = type_label(written) or type_label(_annotation(node, name))
        text = _cut(re.sub(r"^\([^()]*\):\s*", "", plain_text(item.description)), TEXT_LENGTH, " ")
        if name.isidentifier() and label and re.search(r"[A-Za-z]{2}", text):
            yield name, text, label


def _documented(docstring: str, style: DocstringStyle) -> Iterator[DocstringParameter]:
    """What griffe reads, once the places where it would lose parameters are mended."""
    for pattern, replacement in MENDS.get(style, ()):
        docstring = re.sub(pattern, replacement, docstring)
    try:
        sections = parse(Docstring(docstring), style, warnings=False)
    except IndexError:  # a docstring that ends with the title of a section
        return
    for section in sections:
        if section.kind in (DocstringSectionKind.parameters, DocstringSectionKind.other_parameters):
            yield from section.value


def _annotation(signature: _Node | None, parameter: str) -> str:
    if isinstance(signature, _Function):
        arguments = signature.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            if argument.arg == parameter and argument.annotation:
                written = ast.unparse(argument.annotation)
                # Quotes are forward references, except in Literal.
                return written if "Literal" in written else re.sub("['\"]", "", written)
    return ""


def _first_sentence(docstring: str) -> str | None:
    """The first sentence of the summary, or nothing where there is none or it is too short or too long."""
    paragraph = _SECTION.split(docstring.partition("\n\n")[0])[0]
    if _NO_SUMMARY.match(paragraph):
        return None
    # A property's summary may begin with its type.
    summary = plain_text(re.sub(r"^`[^`\n]+`: ", "", paragraph))
    sentence = match[0] if (match := _SENTENCE.match(summary)) else f"{summary}."
    fits = len(sentence.split()) in TARGET_WORDS and re.match(r"\w.*[^:]\.$", sentence)
    return sentence if fits else None


def _cut(text: str, length: int, separator: str, end: str = "") -> str:
    return text if len(text) <= length else text[: length + 1 - len(end)].rsplit(separator, 1)[0] + end


def _package_folder(package: str, distributions: Iterable[str]) -> Path:
    specification = importlib.util.find_spec(package) if package.isidentifier() else None
    if specification is None or not specification.submodule_search_locations:
        others = {name for name in distributions if name.isidentifier() and name[0] != "_"} - {*PACKAGES}
        allowed = nearest(package, (*PACKAGES, *sorted(others)))
        raise DataError(f"builtin:docstrings: package {package!r} is not installed{allowed}")
    return Path(next(iter(specification.submodule_search_locations)))


def _read_cache(path: Path, package: str) -> Rows | None:
    """The rows of a cache file, or nothing if it is missing, cut short or malformed."""
    rows: Rows = {task: [] for task in FIELDS}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            count = json.loads(file.readline())
            for line in file:
                task, *values = json.loads(line)
                rows[task].append(dict(zip(FIELDS[task], (package, *values), strict=True)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return None
    return rows if sum(map(len, rows.values())) == count else None


def _write_cache(path: Path, rows: Rows) -> None:
    """Write all or nothing; a folder that cannot be written costs a warning."""
    lines = [json.dumps([task, *list(row.values())[1:]]) for task, items in rows.items() for row in items]
    packed = gzip.compress("\n".join([str(len(lines)), *lines]).encode(), compresslevel=5, mtime=0)
    try:
        from ..core.files import write_bytes  # imports torch, which recipes are checked without

        private(path.parent)
        write_bytes(path, packed)
    except OSError as error:
        warnings.warn(f"{path.parent}: docstrings not kept: {error.strerror}", RuntimeWarning, stacklevel=3)
