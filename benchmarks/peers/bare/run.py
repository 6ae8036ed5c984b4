"""A bare loop over clients: ``transformers`` and ``peft``, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from work import Job, Record, read, train, weighted_mean, write


def main() -> None:
    """``run.py JOB RESULT``."""
    job = Job(sys.argv[1])
    record, model = Record(job, sys.argv[2]), job.model()
    state = read(model)
    for plan in job.rounds:
        record.begin()
        states, losses = [], []
        for item in plan.values():
            write(model, state)
            losses.append((train(model, job, item["batches"]), sum(map(len, item["batches"]))))
            states.append((read(model), item["weight"]))
        state = weighted_mean(states)
        record.end(losses)
    record.save(model, state)


if __name__ == "__main__":
    main()
