"""Pictures of the watched page and of the report for the documentation, by a headless Chromium.

    python scripts/screenshots.py runs/comments --out docs/images

``CHROMIUM`` names the program where it is not on the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from fedcustom.watch.server import WatchServer


class Picture(NamedTuple):
    """A picture's file, the page's path, its size in CSS pixels, and whether a reader prefers dark pages."""

    name: str
    path: str
    width: int
    height: int
    dark: bool = False


PICTURES = (
    Picture("watch-desktop", "", 1280, 1400),
    Picture("watch-phone-dark", "", 390, 1400, dark=True),
    Picture("report-desktop", "report", 1280, 1400),
    Picture("report-desktop-dark", "report", 1280, 1400, dark=True),
    Picture("report-phone", "report", 390, 1400),
)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or folders that hold some")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    arguments = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        raise SystemExit("error: there is no chromium on the PATH (or in CHROMIUM)")
    arguments.out.mkdir(parents=True, exist_ok=True)
    server = WatchServer(arguments.runs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for picture in PICTURES:
        take(picture, server.url, arguments.out, chromium)
        print(arguments.out / f"{picture.name}.png")
    server.shutdown()


def take(picture: Picture, url: str, out: Path, chromium: str) -> None:
    """Write one picture.

    Raises:
        subprocess.CalledProcessError: the browser fails.
    """
    scheme = 0 if picture.dark else 1
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                chromium,
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                f"--user-data-dir={profile}",
                f"--blink-settings=preferredColorScheme={scheme}",
                "--virtual-time-budget=8000",
                f"--window-size={picture.width},{picture.height}",
                f"--screenshot={(out / f'{picture.name}.png').absolute()}",
                url + picture.path,
            ],
            capture_output=True,
            timeout=240,
            check=True,
        )


if __name__ == "__main__":
    main()
