"""Feed the gate and the messages' schema with mutated messages, and say whether anything but WireError came
of one, how long the slowest took, and how memory grew.

    python scripts/fuzz.py --count 1000000
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fedcustom.core.errors import WireError
from fedcustom.transport import wire
from helpers.fuzz import mutated, understand, well_formed

LIMIT = 2**20
"""Bytes of tensors that a message may hold."""


def main() -> int:
    """Run the fuzzer; 1 if an input escaped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    chosen = parser.parse_args()
    escaped = read = decoded = 0
    slowest, which = 0.0, 0
    begun, resident = time.perf_counter(), 0
    for seed in range(chosen.seed, chosen.seed + chosen.count):
        payload = mutated(well_formed(seed), seed)
        started = time.process_time()
        try:
            _, values = wire.decode(payload, limit=LIMIT)
            decoded += 1
            understand(values, seed)
            read += 1
        except WireError:
            pass
        except Exception:
            escaped += 1
            print(f"input {seed} escaped:\n{traceback.format_exc()}")
        seconds = time.process_time() - started
        if seconds > slowest:
            slowest, which = seconds, seed
        if seed - chosen.seed == chosen.count // 10:
            resident = _resident()
    grown = _resident() - resident
    print(f"{chosen.count:,} inputs in {time.perf_counter() - begun:.0f} s")
    print(f"{decoded:,} passed the gate, {read:,} of them the messages' schema; {escaped} escaped")
    print(f"slowest: {1e3 * slowest:.1f} ms of processor time (input {which})")
    print(f"memory: {_resident() / 1e6:.0f} MB, {grown / 1e6:+.1f} MB since a tenth of the inputs")
    return int(escaped > 0)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
