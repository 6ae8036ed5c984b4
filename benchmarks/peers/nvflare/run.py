"""NVFlare's simulator: a process of one thread a site, all at once. With fewer threads than sites it would
start a process anew for every task.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from job import write_job
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner
from work import Job


def main() -> None:
    """``run.py JOB RESULT``."""
    folder, result = (str(Path(name).resolve()) for name in sys.argv[1:3])
    sites = len(Job(folder).rounds[0])
    with tempfile.TemporaryDirectory() as space:
        target = Path(space) / "job"
        write_job(target, folder, result)
        sys.path.insert(0, str(target / "app" / "custom"))
        runner = SimulatorRunner(str(target), str(Path(space) / "work"), n_clients=sites, threads=sites)
        code = runner.run()
    if code or not (Path(result) / "result.json").exists():
        raise SystemExit(f"the simulator ended with {code} and without a result")


if __name__ == "__main__":
    main()
