"""Flower's simulation: FedAvg over Ray, one actor a core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
PEERS = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = PEERS  # for Ray's actors
sys.path.insert(0, PEERS)
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import Job, Record, read, train, write

FOLDERS = sys.argv[1:3]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
client_app, server_app = ClientApp(), ServerApp()


def resident(folder: str) -> tuple[Job, Any]:
    """An actor loads the job once, whatever clients it plays."""
    import work

    if not hasattr(work, "RESIDENT"):
        torch.set_num_threads(1)
        job = work.Job(folder)
        work.RESIDENT = (job, job.model())
    found: tuple[Job, Any] = work.RESIDENT
    return found


@client_app.train()  # type: ignore[untyped-decorator]
def fit(message: Message, context: Context) -> Message:
    """One client's training."""
    config = message.content["config"]
    job, model = resident(str(config["folder"]))
    item = job.rounds[int(config["round"])][str(config["client"])]
    write(model, message.content["arrays"].to_torch_state_dict())
    loss = train(model, job, item["batches"])
    seen = sum(map(len, item["batches"]))
    metrics = MetricRecord({"loss": loss, "examples": item["weight"], "seen": seen})
    content = RecordDict({"arrays": ArrayRecord(read(model)), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Planned(FedAvg):  # type: ignore[misc]
    """FedAvg with the job's cohorts."""

    def __init__(self, job: Job, record: Record) -> None:
        super().__init__(fraction_evaluate=0.0, weighted_by_key="examples", min_available_nodes=1)
        self.job, self.record = job, record

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
        """A message to a node for each client of the round."""
        self.record.begin()
        for node, name in zip(sorted(grid.get_node_ids()), self.job.rounds[server_round - 1], strict=False):
            told = ConfigRecord({"round": server_round - 1, "client": name, "folder": FOLDERS[0]})
            content = RecordDict({"arrays": arrays, "config": told})
            yield Message(content=content, message_type="train", dst_node_id=node)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """The mean; every client must have answered."""
        replies = list(replies)
        failed = [reply.error for reply in replies if reply.has_error()]
        if failed or len(replies) != len(self.job.rounds[server_round - 1]):
            raise RuntimeError(f"{len(failed)} of {len(replies)} clients failed: {failed[:1]}")
        result = super().aggregate_train(server_round, replies)
        told = [reply.content["metrics"] for reply in replies]
        self.record.end([(float(m["loss"]), float(m["seen"])) for m in told])
        return result


@server_app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    job = Job(FOLDERS[0])
    record, model = Record(job, FOLDERS[1]), job.model()
    while len(list(grid.get_node_ids())) < len(job.rounds[0]):
        pass
    strategy = Planned(job, record)
    result = strategy.start(grid, ArrayRecord(read(model)), num_rounds=len(job.rounds))
    note = f"{THREADS} Ray actors of one thread each, which keep the model loaded"
    record.save(model, result.arrays.to_torch_state_dict(), note=note, processes=True)


if __name__ == "__main__":
    size = max(len(plan) for plan in Job(FOLDERS[0]).rounds)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=size,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": THREADS}},
    )
