"""Each peer in a virtual environment of its own, with pinned versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .harness import PEERS, Engine

BUILD = Path(__file__).parent.parent / "build" / "peers"
NAMES = {"flower": "Flower", "nvflare": "NVFlare", "nvflare_hf": "NVFlare, Trainer", "pfl": "pfl"}
SHARED = {"nvflare_hf": "nvflare"}
"""Peers that run in another one's environment."""


def peer(name: str) -> Engine:
    """The peer in the folder of that name, installed where it is not there yet; with the reason where that is
    not possible.
    """
    place = SHARED.get(name, name)
    python, ready = BUILD / place / "bin" / "python", BUILD / place / "ready"
    wanted = (PEERS / place / "requirements.txt").read_text(encoding="utf-8")
    command = (str(python), str(PEERS / name / "run.py"))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return Engine(NAMES[name], command)
    print(f"  installing {NAMES[name]} into {BUILD / place}", flush=True)
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(BUILD / place)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(PEERS / place / "requirements.txt")],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return Engine(NAMES[name], command, f"cannot be installed: {(lines or ['?'])[0][:200]}")
    ready.write_text(wanted, encoding="utf-8")
    return Engine(NAMES[name], command)
