"""A page in a headless Chromium, where one is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on the PATH (or in CHROMIUM)"
)


def found_by(probe: str, folder: Path, *options: str, url: str = "") -> Any:
    """What the script of a page writes as JSON into ``data-found`` of its body. The page is written as a file
    into ``folder`` and may read files beside it, or it is at ``url``. Nothing may be said on the console.
    """
    (folder / "probe.html").write_text(probe)
    assert CHROMIUM is not None
    result = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={folder / 'profile'}",
            "--allow-file-access-from-files",
            "--virtual-time-budget=20000",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
            "--window-size=1400,900",
            *options,
            "--dump-dom",
            url or (folder / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "CONSOLE" not in result.stderr, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    match = re.search('data-found="([^"]*)"', result.stdout)
    assert match is not None, result.stdout[-2000:]
    return json.loads(match[1].replace("&quot;", '"').replace("&amp;", "&"))
