"""The built-in data set: rows from a small package, the table of types, the cache, and one real package."""

from __future__ import annotations

import gzip
import os
import re
import stat
from pathlib import Path

import pytest

from fedcustom.core.errors import DataError
from fedcustom.data import docstrings
from fedcustom.data.docstring_types import LABELS, plain_text, type_label
from fedcustom.data.docstrings import FIELDS, PACKAGES, SOURCE_LENGTH, TEXT_LENGTH, docstring_rows

NUMPY_STYLE = '''
"""A module about points."""

def clip(a, low=-1.0, *, mode: str = "raise", **extra):
    """Clip the values of an array, e.g. a :func:`~pointy.sum`. Nothing else.

    Parameters
    ----------
    a : array_like of shape (n,) or (n, m)
        The ``values``
        to clip.

        .. versionadded:: 1.2
    low, high : float or None, default=-1.0
        A bound.
    mode
        What to do; see `the page <https://example.org>`_.
    seed : {None, int,
            `numpy.random.Generator`}, optional
        Where numbers come from.
    empty : int
    untyped
        No type is known.

    Returns
    -------
    int
        Never a parameter.
    """


class Box:
    """A box of points.

    Parameters
    ----------
    size : int
        How many points.
    """

    def __init__(self, size):
        """Not a public name and not documented."""

    def area(self):
        """Return the area of the box

        def inner(x):
            a definition in a docstring is none
        """

    def _hidden(self):
        """Return what nobody should see.

        Parameters
        ----------
        flag : bool
            Whether to hide.
        """
'''

GOOGLE_STYLE = '''
class Reader:
    r"""Reads \\d files.

    Args:
        path (`str` or `os.PathLike`, *optional*, defaults to `"x"`):
            Where the [file](https://example.org) is.
        parts: How many parts.
        tensor (:class:`~torch.Tensor`): The tensor.
        size (`dict`, *optional*, defaults to `{"height": 16}`): The size.
    """

    def __init__(self, path="x", parts: "int | None" = None, tensor=None):
        self.path = path

    def read(
        self,
        names: list[str],  # what to read
        strict: bool = True,
    ) -> None:
        """
        Read the named parts of a file.
        Args:
            names: The names.
            strict (bool): (bool): Whether a missing name is an error.
        """

    def close(self):
        """
        Args:
            force (bool): Whether to close at once.
        """


class Writer(Reader):
    def write(self, text, append=False):
        r"""
        text (`str`):
            What to write.
        append (`bool`, *optional*):
            Whether to keep what is there.
        """

    def read(self, names: list[str]):
        """Read the named parts of a file.

        Args:
            names: The names.
        """
'''


def write_package(folder: Path, name: str, version: str | None = "1.0", **modules: str) -> Path:
    package = folder / name
    package.mkdir(exist_ok=True)
    for module, text in modules.items():
        (package / f"{module}.py").write_text(text, encoding="utf-8")
    if version:
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir(exist_ok=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (information / "top_level.txt").write_text(f"{name}\n")
    return package


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write_package(tmp_path, "pointy", __init__="", arrays=NUMPY_STYLE, files=GOOGLE_STYLE)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_arrays.py").write_text(NUMPY_STYLE)
    return folder


def test_classification_rows(package: Path, tmp_path: Path) -> None:
    rows = docstring_rows("classification", ["pointy"], tmp_path / "cache")
    assert all(tuple(row) == FIELDS["classification"] and row["package"] == "pointy" for row in rows)
    assert [tuple(row.values())[1:] for row in rows] == [
        ("pointy.arrays.clip", "a", "The values to clip.", "array"),
        ("pointy.arrays.clip", "low", "A bound.", "float"),
        ("pointy.arrays.clip", "mode", "What to do; see the page.", "str"),
        ("pointy.arrays.clip", "seed", "Where numbers come from.", "other"),
        ("pointy.arrays.Box", "size", "How many points.", "int"),
        ("pointy.arrays.Box._hidden", "flag", "Whether to hide.", "bool"),
        ("pointy.files.Reader", "path", "Where the file is.", "str"),
        ("pointy.files.Reader", "parts", "How many parts.", "int"),
        ("pointy.files.Reader", "tensor", "The tensor.", "array"),
        ("pointy.files.Reader", "size", "The size.", "mapping"),
        ("pointy.files.Reader.read", "names", "The names.", "sequence"),
        ("pointy.files.Reader.read", "strict", "Whether a missing name is an error.", "bool"),
        ("pointy.files.Reader.close", "force", "Whether to close at once.", "bool"),
        ("pointy.files.Writer.write", "text", "What to write.", "str"),
        ("pointy.files.Writer.write", "append", "Whether to keep what is there.", "bool"),
    ]


def test_generation_rows(package: Path, tmp_path: Path) -> None:
    rows = docstring_rows("generation", ["pointy"], tmp_path / "cache")
    assert all(tuple(row) == FIELDS["generation"] and row["package"] == "pointy" for row in rows)
    assert [tuple(row.values())[1:] for row in rows] == [
        (
            "pointy.arrays.clip",
            "def clip(a, low=-1.0, *, mode: str='raise', **extra)",
            "Clip the values of an array, e.g. a pointy.sum.",
        ),
        ("pointy.arrays.Box.area", "def Box.area(self)", "Return the area of the box."),
        (
            "pointy.files.Reader.read",
            "def Reader.read(self, names: list[str], strict: bool=True)",
            "Read the named parts of a file.",
        ),
    ]


def test_long_texts_are_cut_at_a_word_and_long_signatures_at_a_parameter(
    package: Path, tmp_path: Path
) -> None:
    arguments = ", ".join(f"argument_{number}" for number in range(60))
    section = f"Args:\n        argument_0 (int): {'word ' * 200}"
    text = f'def f({arguments}):\n    """Do it all at once.\n\n    {section}\n    """\n'
    write_package(package.parent, "pointy", arrays="", files=text)
    (row,) = docstring_rows("classification", ["pointy"], tmp_path / "cache")
    assert TEXT_LENGTH - 5 < len(row["text"]) <= TEXT_LENGTH
    assert row["text"].endswith("word")
    (row,) = docstring_rows("generation", ["pointy"], tmp_path / "cache")
    assert SOURCE_LENGTH - 20 < len(row["source"]) <= SOURCE_LENGTH
    assert row["source"].endswith(", ...)")


@pytest.mark.parametrize(
    ("annotation", "label"),
    [
        ("bool", "bool"),
        ("`bool`, *optional*, defaults to `False`", "bool"),
        ("{True, False}", "bool"),
        ("Literal[False]", "bool"),
        ("bool, optional (default=False)", "bool"),
        ("int", "int"),
        ("`int`, *optional*, defaults to -100", "int"),
        ("int or None", "int"),
        ("Optional[int]", "int"),
        ("{None, int}", "int"),
        ("bool or int", "int"),
        ("{0, 1, 2}", "int"),
        ("non-negative integer", "int"),
        ("int > 0", "int"),
        ("float", "float"),
        ("int or float", "float"),
        ("Union[bool, int, float]", "float"),
        ("float in range [0.0, 1.0] or int", "float"),
        ("scalar with the same dtype as ``a``", "float"),
        ("complex", "float"),
        ("str", "str"),
        ("{'left', 'right'}, default 'left'", "str"),
        ("'zeros' | 'edge' | None", "str"),
        ("`str` or `os.PathLike`, *optional*", "str"),
        ('`str`, *optional*, defaults to `"</s>"`', "str"),
        ('Literal["state", "alloc", None]', "str"),
        ("str {'full', 'valid', 'same'}", "str"),
        ("array_like", "array"),
        (":class:`~torch.Tensor`", "array"),
        ("`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*", "array"),
        ("{array-like, sparse matrix} of shape (n_samples, n_features)", "array"),
        ("array-like of shape (n_samples,) or (n_samples, n_outputs), default=None", "array"),
        ("(N, N) array_like", "array"),
        ("float or array_like of ints", "array"),
        ("Series or DataFrame", "array"),
        ("ndarray, shape (n,)", "array"),
        ("npt.NDArray[np.bool_] | None", "array"),
        ("list of str", "sequence"),
        ("int or tuple of ints", "sequence"),
        ("(float, float)", "sequence"),
        ("str or list of str", "sequence"),
        ("`tuple(torch.Tensor)`, *optional*, returned when `output_attentions=True` is passed", "sequence"),
        ("Iterable[torch.Tensor] | None", "sequence"),
        ("list of {array-like, sparse matrix, dataframe}", "sequence"),
        ("torch.Size", "sequence"),
        ("dict", "mapping"),
        ("Dict[str, Union[int, str]]", "mapping"),
        ("dict of {str: array}", "mapping"),
        ("Mapping[str, int] | None", "mapping"),
        ("callable", "callable"),
        ("Callable[[int, str], bool]", "callable"),
        ("callable ``f(x, *args)``", "callable"),
        ("function or None", "callable"),
        ("str or callable", "other"),
        ("int, RandomState instance or None", "other"),
        ("int or 'auto'", "other"),
        ("str, path object or file-like object", "other"),
        ("list or dict", "other"),
        ("estimator object implementing 'fit' and 'predict'", "other"),
        ("NetworkX graph", "other"),
        ("torch.dtype", "other"),
        ("`nn.Module`", "other"),
        ("Any", "other"),
        ("None", None),
        ("optional", None),
        ("", None),
    ],
)
def test_type_label(annotation: str, label: str | None) -> None:
    assert label is None or label in LABELS
    assert type_label(annotation) == label


def test_plain_text() -> None:
    prose = "See :class:`A <b.A>`, [`~c.D`] and **this**\n``x * y`` [1]_ of `page <https://e.org>`_::"
    prose += "\n\n    >>> f(2)"
    assert plain_text(prose) == "See A, c.D and this x * y of page:"


def test_cache_is_read_until_the_content_changes(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = docstring_rows("classification", ["pointy"], cache)
    (file,) = cache.iterdir()
    assert re.fullmatch(r"pointy-[0-9a-f]{32}\.jsonl\.gz", file.name)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(docstrings, "_parse_package", None)  # nothing is parsed again
        assert docstring_rows("classification", ["pointy"], cache) == first
    times = {path: path.stat().st_mtime_ns for path in package.rglob("*.py")}
    sources = {path: path.read_text() for path in times}
    write_package(tmp_path, "pointy", arrays="", files="")
    for path, when in times.items():  # the same version, and the same time of change
        os.utime(path, ns=(when, when))
    assert docstring_rows("classification", ["pointy"], cache) == []
    for path, text in sources.items():
        path.write_text(text)
    assert docstring_rows("classification", ["pointy"], cache) == first
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"not gzip", gzip.compress(b"0\n[]\n"), gzip.compress(b'1\n["classification", "a"]\n'), None],
    ids=["empty", "not gzip", "another version", "without rows", "cut off"],
)
def test_corrupt_cache_is_parsed_anew(package: Path, tmp_path: Path, content: bytes | None) -> None:
    cache = tmp_path / "cache"
    rows = docstring_rows("classification", ["pointy"], cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-20] if content is None else content)
    assert docstring_rows("classification", ["pointy"], cache) == rows
    assert list(cache.iterdir()) == [file]
    assert file.read_bytes() == whole


def test_package_without_a_version_is_read_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path, "loose", version=None, __init__=NUMPY_STYLE)
    rows = docstring_rows("generation", ["loose"], tmp_path / "cache")
    assert [row["function"] for row in rows] == ["loose.clip", "loose.Box.area"]
    write_package(tmp_path, "loose", version=None, __init__=NUMPY_STYLE.replace("clip", "clap"))
    rows = docstring_rows("generation", ["loose"], tmp_path / "cache")
    assert [row["function"] for row in rows] == ["loose.clap", "loose.Box.area"]


def test_cache_folder_that_cannot_be_written_costs_a_warning(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="not kept"):
        rows = docstring_rows("classification", ["pointy"], tmp_path / "file" / "cache")
    assert rows


def test_failed_write_leaves_no_file(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert docstring_rows("classification", ["pointy"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FEDCUSTOM_CACHE": "own", "XDG_CACHE_HOME": "shared"}, "own/docstrings"),
        ({"XDG_CACHE_HOME": "shared"}, "shared/fedcustom/docstrings"),
        ({}, ".cache/fedcustom/docstrings"),
    ],
)
def test_default_cache(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("FEDCUSTOM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    docstring_rows("generation", ["pointy"])
    assert len(list((tmp_path / folder).iterdir())) == 1


def test_unknown_package_and_task() -> None:
    with pytest.raises(DataError, match=r"'sklern' is not installed.*numpy.*did you mean 'sklearn'") as error:
        docstring_rows("classification", ["sklern"])
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"'classify'.*classification"):
        docstring_rows("classify", ["numpy"])  # type: ignore[arg-type]


def test_real_package(tmp_path: Path) -> None:
    assert len(PACKAGES) == 8
    rows = docstring_rows("classification", ["peft"], tmp_path)
    assert len(rows) > 300
    assert {row["label"] for row in rows} <= set(LABELS)
    assert {"bool", "int", "float", "str", "array"} <= {row["label"] for row in rows}
    assert all(0 < len(row["text"]) <= TEXT_LENGTH and row["text"] == row["text"].strip() for row in rows)
    assert len({(row["text"], row["label"]) for row in rows}) == len(rows)
    sentences = docstring_rows("generation", ["peft"], tmp_path)
    assert len(sentences) > 100
    assert all(row["source"].startswith("def ") and row["target"].endswith(".") for row in sentences)
