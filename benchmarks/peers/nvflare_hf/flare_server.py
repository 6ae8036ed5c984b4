"""The server's side: the adapter that everybody starts from, and what is noted of the rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from work import Job, Record, read

NOTE = (
    "a Trainer of one thread at every site, all at once, each beside the process that NVFlare keeps for the "
    "site; AdamW starts anew every round (restore_state=False), and nothing is evaluated before training"
)


class Adapter(torch.nn.Module):
    """The model whose adapter alone is its state, as in NVFlare's example."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = Job(folder).model()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The adapter."""
        return peft.get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Put an adapter into the model."""
        return peft.set_peft_model_state_dict(self.model, state_dict)


class AdapterPersistor(PTFileModelPersistor):  # type: ignore[misc]
    """NVFlare's own, which loads the model and writes it every round; it also notes when rounds begin and
    end, and leaves the result.
    """

    def __init__(self, folder: str, result: str) -> None:
        super().__init__(
            model={"path": "flare_server.Adapter", "args": {"folder": folder}}, allow_numpy_conversion=False
        )
        self.folder, self.result = folder, result
        self.job: Job | None = None

    def handle_event(self, event: str, fl_ctx: Any) -> None:
        """A round begins."""
        super().handle_event(event, fl_ctx)
        if event == AppEventType.ROUND_STARTED:
            if self.job is None:
                self.job = Job(self.folder)
                self.record = Record(self.job, self.result)
            self.record.begin()

    def save_model(self, ml: Any, fl_ctx: Any) -> None:
        """A round has ended; after the last one, the adapter and the times are written."""
        super().save_model(ml, fl_ctx)
        assert self.job is not None
        number = len(self.record.seconds)
        told = [
            json.loads((Path(self.result) / f"loss-{number}-{site}.json").read_text(encoding="utf-8"))
            for site in range(len(self.job.clients))
        ]
        self.record.end([(one["loss"], one["seen"]) for one in told])
        if len(self.record.seconds) == len(self.job.rounds):
            self.model.load_state_dict(self.persistence_manager.to_model_learnable(None)["weights"])
            self.record.save(self.model.model, read(self.model.model), note=NOTE, processes=True)
