"""What NVFlare runs: a controller that makes the rounds, and an executor that trains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller, Task
from nvflare.apis.shareable import Shareable, make_reply
from work import Job, Record, read, train, weighted_mean, write


class Trainer(Executor):  # type: ignore[misc]
    """Trains one client; the model stays loaded."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.loaded: tuple[Job, Any] | None = None

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """One client's training."""
        if self.loaded is None:
            torch.set_num_threads(1)
            job = Job(self.folder)
            self.loaded = job, job.model()
        job, model = self.loaded
        site = int(fl_ctx.get_identity_name().removeprefix("site-"))
        plan = job.rounds[int(shareable["round"])]
        item = list(plan.values())[site - 1]
        write(model, {name: torch.from_numpy(array) for name, array in shareable["state"].items()})
        loss = train(model, job, item["batches"])
        reply = make_reply(ReturnCode.OK)
        reply["state"] = {name: tensor.numpy() for name, tensor in read(model).items()}
        reply["weight"], reply["loss"] = item["weight"], loss
        reply["seen"] = sum(map(len, item["batches"]))
        return reply


class Averaging(Controller):  # type: ignore[misc]
    """Asks every site in every round, and takes the mean."""

    def __init__(self, folder: str, result: str) -> None:
        super().__init__(task_check_period=0.02)
        self.folders = folder, result

    def start_controller(self, fl_ctx: Any) -> None:
        """Nothing to prepare."""

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing to clear away."""

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """Late answers are not used."""

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """All rounds."""
        job = Job(self.folders[0])
        record, model = Record(job, self.folders[1]), job.model()
        state = read(model)
        for number, plan in enumerate(job.rounds):
            record.begin()
            answers: list[Any] = []

            def received(client_task: Any, fl_ctx: Any, answers: list[Any] = answers) -> None:
                answers.append(client_task.result)
                client_task.result = None

            data = Shareable()
            data["round"] = number
            data["state"] = {name: tensor.numpy() for name, tensor in state.items()}
            task = Task(name="train", data=data, timeout=600, result_received_cb=received)
            self.broadcast_and_wait(
                task=task, fl_ctx=fl_ctx, min_responses=len(plan), abort_signal=abort_signal
            )
            if len(answers) != len(plan) or any(a.get_return_code() != ReturnCode.OK for a in answers):
                raise RuntimeError(f"{len(answers)} of {len(plan)} sites answered")
            told = [
                ({name: torch.from_numpy(array) for name, array in a["state"].items()}, a["weight"])
                for a in answers
            ]
            state = weighted_mean(told)
            record.end([(a["loss"], a["seen"]) for a in answers])
        record.save(
            model,
            state,
            processes=True,
            note="one process of one thread a site, which keeps the model loaded",
        )


def write_job(target: Path, folder: str, result: str) -> None:
    """NVFlare's job folder."""
    config = target / "app" / "config"
    config.mkdir(parents=True)
    custom = target / "app" / "custom"
    custom.mkdir()
    here = Path(__file__)
    for source in (here, here.parent.parent / "work.py"):
        (custom / ("flare_job.py" if source == here else source.name)).write_text(source.read_text())
    meta = {"name": "bench", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}}
    (target / "meta.json").write_text(json.dumps(meta))
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.05},
        "workflows": [
            {"id": "rounds", "path": "flare_job.Averaging", "args": {"folder": folder, "result": result}}
        ],
    }
    client = {
        "format_version": 2,
        "executors": [
            {"tasks": ["train"], "executor": {"path": "flare_job.Trainer", "args": {"folder": folder}}}
        ],
    }
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
    os.environ["PYTHONPATH"] = str(custom)
